"""The captured model: where it is, whether it is the same, and in which dtype it is replayed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo.calibrate.replay.calls import Calls
from octavo.capture.devices import DTYPES
from octavo.capture.errors import MisfitError, UsageError
from octavo.capture.store.reader import Capture
from octavo.pipelines.denoisers import denoisers_in
from octavo.pipelines.family import Family
from octavo.pipelines.files import model_directory, read_json

from .calibrate_options import CalibrateOptions


@dataclass(frozen=True)
class Captured:
    """A denoiser as a capture has it: its name there, its family, and the calls to replay, `count` of them."""

    capture: Capture
    component: str
    family: Family
    calls: Calls
    count: int


def origin_of(captured: Captured, options: CalibrateOptions) -> dict[str, str]:
    """The entries of the report that say where the model is, and which of its denoisers was quantized."""
    source = source_of(captured.capture, options)
    return {"model": source if source == "demo" else str(Path(source).resolve()), "component": captured.component}


def source_of(capture: Capture, options: CalibrateOptions) -> str:
    """The directory of the captured model, or demo. Raises UsageError where neither options nor capture name it."""
    source = options.model or capture.manifest.get("model")
    if source is None:
        raise UsageError(f"{capture.directory}: does not say which model it is of. Give it with --model.")
    return str(source)


def _denoisers_at(directory: Path) -> list[str]:
    """The names of the denoisers of the model in a directory, at least one."""
    index = directory / "model_index.json"
    found = denoisers_in(read_json(index)) if index.is_file() else []
    return found or ["transformer"]


def check_fingerprint(capture: Capture, component: str, now: dict[str, str], source: str, allow_revision: bool) -> None:
    """Raises MisfitError when the model of the fingerprint `now` is not the one whose calls were captured."""
    was = capture.manifest.get("components", {}).get(component)
    if was is None:  # a converted file: its calls are known to fit when they run
        return
    if was["class"] != now["class"]:
        fact = f"was captured from {was['class']}; this model is {now['class']}"
    elif was["names"] != now["names"]:
        fact = f"was captured from a {was['class']} with other tensors than {source}"
    elif was["weights"] != now["weights"] and not allow_revision:
        revisions = f"rev {was['weights'][:8]}; this model is rev {now['weights'][:8]}"
        fact = f"was captured from {was['class']} {revisions} (--allow-revision accepts it)"
    else:
        return
    raise MisfitError(f"{capture.directory} {fact}. Give the captured model with --model.")


def casting(capture: Capture, dtype: str | None) -> Callable[[Any], Any]:
    """A function that casts the arguments of a call to the dtype of the deployment, if they are in the captured one."""
    before, after = DTYPES.get(capture.manifest.get("dtype", "")), DTYPES.get(dtype or "")
    if after is None or before == after:
        return lambda value: value

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(after) if value.dtype == before else value
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(cast, value))
        return value

    return cast


def component_of(capture: Capture, options: CalibrateOptions) -> str:
    """The denoiser to quantize, by name: the one of the options, or the only one captured.

    A converted file does not name its denoiser: without an option the only one of the model. Raises UsageError where
    there is no such denoiser, or the choice is open.
    """
    names, wanted = list(capture.manifest.get("components", {})), options.component
    if not names:
        if wanted is not None:
            return wanted
        names = _denoisers_at(model_directory(source_of(capture, options)))
        if len(names) > 1:
            fact = f"does not say which denoiser of {options.model} it is of"
            raise UsageError(f"{capture.directory}: {fact}. Choose one of {', '.join(names)} with --component.")
        return names[0]
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None or wanted not in names:
        fact = f"no calls of '{wanted}'" if wanted else f"holds calls of {len(names)} denoisers"
        raise UsageError(f"{capture.directory}: {fact}. Choose one of {', '.join(names)} with --component.")
    return wanted
