"""Runs the proof that a runtime's own code loads checkpoints, in a process and an environment of its own.

A proof is a module of bench with an object `PROOF`. `prove` writes the tiny models, and runs the module once, with the
runtime's packages and the list of directories, so that the runtime is imported once. In that process `answer` compares
one directory after another and writes the facts beside each. `prove` turns the facts into rows of a table.
"""

import json
import subprocess
from pathlib import Path

from .consumer_environment import installed, run
from .consumer_jobs import FACTS, Job, Proof, Row
from .consumer_models import TITLES, written


def prove(proof: Proof, folder: Path) -> list[Row]:
    """Writes the directories of a proof into `folder`, lets the runtime load them, and returns a row for each family,
    which is ok if the directories of all schemes are."""
    packages, place = installed(proof.name, proof.packages), folder / (proof.format + proof.name)
    place.mkdir(parents=True, exist_ok=True)
    jobs = [_job(proof, family, scheme, place) for family in proof.families for scheme in proof.schemes]
    (place / "jobs.json").write_text(json.dumps(jobs))
    end = ""
    try:
        run(proof.module, packages, place / "jobs.json", **proof.variables)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        end = str(error).strip().splitlines()[-1]
    rows = []
    for family in proof.families:
        verdicts = [_verdict(proof, job, end) for job in jobs if job.family == family]
        rows.append(
            Row(TITLES[family], proof.how, all(ok for ok, _ in verdicts), "; ".join(fact for _, fact in verdicts))
        )
    return rows


def _job(proof: Proof, family: str, scheme: str, place: Path) -> Job:
    """Writes a directory and returns the job of loading it."""
    dtype = proof.schemes[scheme]
    out = place / f"{family}-{scheme}" / "out"
    kind = type(written(family, proof.format or proof.name, scheme, out, dtype)).__name__
    return Job(proof.name, family, scheme, str(dtype).removeprefix("torch."), kind, str(out))


def _verdict(proof: Proof, job: Job, end: str) -> tuple[bool, str]:
    """Returns whether a job is ok, and the fact in words. `end` is the reason why the process ended early, or empty."""
    path = Path(job.out).parent / FACTS
    facts = json.loads(path.read_text()) if path.is_file() else {"error": end or "no answer"}
    ok, fact = (False, facts["error"]) if "error" in facts else proof.judge(job, facts)
    return ok, f"{job.scheme} in {job.dtype}: {fact}"
