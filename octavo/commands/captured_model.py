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
    origin = {"model": source if source == "demo" else str(Path(source).resolve()), "component": captured.component}
    return origin | ({"dtype": options.dtype} if options.dtype else {})


def source_of(capture: Capture, options: CalibrateOptions) -> str:
    """The directory of the captured model, or demo. Raises UsageError where neither options nor capture name it."""
    source = options.model or capture.manifest.get("model")
    if source is None:
        raise UsageError(f"{capture.directory}: does not say which model it is of. Give it with --model.")
    return str(source)


def _only_denoiser(capture: Capture, options: CalibrateOptions) -> str:
    """The name of the only denoiser of the captured model. Raises UsageError where it has several."""
    source = source_of(capture, options)
    index = model_directory(source) / "model_index.json"
    names = (denoisers_in(read_json(index)) if index.is_file() else []) or ["transformer"]
    if len(names) > 1:
        fact = f"does not say which denoiser of {source} it is of"
        raise UsageError(f"{capture.directory}: {fact}. Choose one of {', '.join(names)} with --component.")
    return names[0]


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


def components_of(capture: Capture, options: CalibrateOptions) -> list[str]:
    """The denoisers to quantize, by name: all that were captured, or the one of the options.

    A converted file does not name its denoiser: without an option it is the only one of the model. Raises UsageError
    where there is no such denoiser, or the choice is open; MisfitError for a denoiser without calls.
    """
    names, wanted = list(capture.manifest.get("components", {})), options.component
    if not names:
        return [wanted or _only_denoiser(capture, options)]
    if wanted is not None and wanted not in names:
        fact = f"no calls of '{wanted}'"
        raise UsageError(f"{capture.directory}: {fact}. Choose one of {', '.join(names)} with --component.")
    chosen = names if wanted is None else [wanted]
    called = {header.component for unit in capture.units for header in unit.calls}
    if missing := [name for name in chosen if name not in called]:
        remedy = "Capture with more --steps" + (", or choose another with --component" if len(names) > 1 else "")
        raise MisfitError(f"{capture.directory}: holds no calls of '{missing[0]}'. {remedy}.")
    return chosen
