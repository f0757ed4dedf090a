"""Small captures for the tests of the store, written without a model, and checks of what is read back."""

from pathlib import Path
from typing import Any

import torch

from octavo.capture.store.reader import Capture
from octavo.capture.store.writer import Call, CaptureWriter

from .refusals import refused

MANIFEST = {"pipeline": "StableDiffusion3Pipeline", "settings": {"steps": 2, "seed": 0}, "prompts": 3}


PLANNED = MANIFEST | {"prompts": 50}


def calls_of(unit: int, steps: int = 2, channels: int = 8) -> list[Call]:
    """Returns the calls of one prompt. Both guidance halves of the latents are equal, and the prompt states do not
    change."""
    generator = torch.Generator().manual_seed(unit)
    states = torch.randn(2, 5, 128, generator=generator).half()
    calls = []
    for step in range(steps):
        latents = torch.randn(1, channels, 8, 8, generator=generator)
        kwargs: dict[str, Any] = {
            "hidden_states": torch.cat([latents, latents]),
            "encoder_hidden_states": states,
            "timestep": torch.tensor([999.0 - step, 999.0 - step]),
            "added": {"ids": torch.tensor([[1, 2], [3, 4]]), "none": None, "sizes": (1, 2.5, [True])},
        }
        calls.append(Call("transformer", step, step, 999.0 - step, None, (), kwargs))
    return calls


def info_of(unit: int) -> dict[str, Any]:
    """Returns the prompt and the seed of a unit."""
    return {"prompt": f"prompt {unit}", "seed": 0}


def fill(writer: CaptureWriter, units: range | list[int]) -> None:
    """Writes the units that the capture does not have yet."""
    for index in units:
        if index not in writer.stored:
            with writer.unit(index, info_of(index)) as unit:
                for call in calls_of(index):
                    unit.add(call)


def make_store(directory: Path, units: int = 3, **options: bool) -> Path:
    """Writes a finished capture of `units` prompts."""
    with CaptureWriter.create(directory, MANIFEST | {"prompts": units}, **options) as writer:
        fill(writer, range(units))
        writer.complete()
    return directory


def same(one: Any, other: Any) -> bool:
    """Returns whether two values, containers included, are equal in type, dtype and content."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and one.equal(other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def holds(directory: Path, units: int = 3) -> bool:
    """Returns whether a finished capture is sound and returns the calls of `calls_of`."""
    capture = Capture.open(directory)
    capture.verify()
    expected = [call for unit in range(units) for call in calls_of(unit)]
    calls = list(capture.calls())
    return len(calls) == len(expected) and all(map(same, calls, expected))


def files_of(directory: Path) -> list[Path]:
    """Returns all files below a directory, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def refused_create(directory: Path, exit_code: int, manifest: dict[str, Any] = PLANNED, **options: Any) -> str:
    """Checks that CaptureWriter.create refuses the directory. Returns the message without the directory in front."""
    message = refused(lambda: CaptureWriter.create(directory, manifest, **{"resume": False} | options), exit_code)
    return message.removeprefix(f"{directory}")


def refused_read(directory: Path, exit_code: int = 3, **options: bool) -> str:
    """Checks that reading the whole capture is refused. Returns the message without the directory in front."""
    message = refused(lambda: list(Capture.open(directory, **options).calls()), exit_code)
    return message.removeprefix(str(directory))


def unit_of(store: Path, index: int = 0) -> Path:
    """Returns the directory of a unit."""
    return next((store / "units").glob(f"{index:06d}-*"))


def remedy(unit: Path) -> str:
    """Returns the advice at the end of a message about a damaged unit."""
    return f"Delete {unit} and run capture --resume."
