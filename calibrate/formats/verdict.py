"""Defines the verdict, one line of a check of a checkpoint."""

from typing import NamedTuple

# consumers: diffusers with Octavo imported, and diffusers with torchao installed but without Octavo
OCTAVO, TORCHAO = "diffusers", "torchao"


class Verdict(NamedTuple):
    """One line of a check of a checkpoint: the consumer (the software that would load the checkpoint), the subject that
    was checked, whether the subject is as the consumer needs it (`ok`), and the fact in words."""

    consumer: str
    subject: str
    ok: bool
    fact: str
