"""One line of a check of a checkpoint: the consumer, the subject, whether the subject is fit, and the fact."""

from typing import NamedTuple

OCTAVO, TORCHAO = "diffusers", "torchao"  # consumers: with Octavo imported, and with torchao installed alone


class Verdict(NamedTuple):
    """One line of a check: a consumer, the subject looked at, whether the subject fits the consumer, and the fact."""

    consumer: str
    subject: str
    ok: bool
    fact: str
