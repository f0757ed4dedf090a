"""One line of a check: who reads a checkpoint, what they look at, and whether it is as they need it."""

from typing import NamedTuple

OCTAVO, TORCHAO = "diffusers", "torchao"  # consumers: with Octavo imported, and with torchao installed alone


class Verdict(NamedTuple):
    """One line: a consumer, what it looks at, whether that is as it needs it, and the fact."""

    consumer: str
    subject: str
    ok: bool
    fact: str
