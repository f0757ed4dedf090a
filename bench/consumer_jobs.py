"""Defines the jobs of a proof that a runtime loads checkpoints, and what the process of the runtime needs for them.

Importing this module does not import Octavo, which some runtimes have to do without.
"""

import json
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FACTS, REFERENCE = "facts.json", "reference.pt"  # files beside a directory to load
LEVEL = 500.0  # the noise level for layers with a range for each bin of noise levels
EQUAL = 300.0  # dB; `decibels` returns more only for equal tensors


class Row(NamedTuple):
    """A row of the table: what was proven of the models of a family. `how` is "computed", "loaded" or "read"."""

    family: str
    how: str
    ok: bool
    fact: str


class Job(NamedTuple):
    """A directory `out` to load: a tiny model of `family`, an object of the class `kind` in diffusers, with integer
    layers of this `scheme` and float tensors in `dtype`."""

    runtime: str
    family: str
    scheme: str
    dtype: str
    kind: str
    out: str


class Proof(NamedTuple):
    """A proof: the `module` of bench that loads directories, with these `packages` and environment `variables`, for
    each of the `families` and `schemes`. `judge` returns from the facts of a directory whether they are as they should
    be, and a fact in words. `schemes` is a dict from a scheme to the dtype of the float tensors. The packages are
    installed under `name`, which is also the format, unless `format` names another one."""

    module: str
    name: str
    packages: Sequence[str]
    families: Iterable[str]
    schemes: Mapping[str, torch.dtype]
    how: str
    judge: Callable[[Job, Mapping[str, Any]], tuple[bool, str]]
    variables: Mapping[str, str] = {}
    format: str = ""


def answer(listing: str, compute: Callable[[Job], Mapping[str, Any]]) -> None:
    """Writes the facts that `compute` finds for each job in the file `listing`, or its error, beside the directory."""
    for job in (Job(*fields) for fields in json.loads(Path(listing).read_text())):
        facts: Mapping[str, Any]
        try:
            facts = compute(job)
        except Exception as error:  # the other jobs are independent of this one
            traceback.print_exc()
            facts = {"error": " ".join(f"{type(error).__name__} {error}".split())[:200]}
        (Path(job.out).parent / FACTS).write_text(json.dumps(facts))


def decibels(exact: Tensor, other: Tensor) -> float:
    """Returns how close `other` is to `exact`, in dB: minus infinity for another shape, more than EQUAL if equal."""
    if exact.shape != other.shape:
        return float("-inf")
    error = (exact.double() - other.double()).square().sum()
    power = exact.double().square().sum()
    return float(10 * torch.log10(power / error.clamp_min(power * 1e-40)))


def agreement(least: float) -> str:
    """Says how close the outputs of layers are, from the `least` of their `decibels`."""
    return "outputs equal" if least > EQUAL else f"outputs agree to {least:.0f} dB"
