"""The model that a capture is of: where it is, whether it is the same, and in which dtype it is replayed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo.capture.devices import DTYPES
from octavo.capture.errors import MisfitError, UsageError
from octavo.capture.store.reader import Capture

from .calibrate_options import CalibrateOptions


def told(options: CalibrateOptions, capture: Capture, component: str) -> dict[str, str]:
    """What the report says of the model: where it is, and which of its denoisers this is."""
    source = source_of(capture, options)
    return {"model": source if source == "demo" else str(Path(source).resolve()), "component": component}


def source_of(capture: Capture, options: CalibrateOptions) -> str:
    """Where the captured model is."""
    source = options.model or capture.manifest.get("model")
    if source is None:
        raise UsageError(f"{capture.directory}: does not say which model it is of. Give it with --model.")
    return str(source)


def check_fingerprint(capture: Capture, component: str, now: dict[str, str], source: str, allow_revision: bool) -> None:
    """Raises MisfitError when the model of the fingerprint `now` is not the one whose calls were captured."""
    was = capture.manifest["components"][component]
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
    """What brings the arguments of a call to the dtype of the deployment: those in the captured dtype change."""
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


def component_of(capture: Capture, wanted: str | None) -> str:
    """The denoiser to quantize: the one captured, or the one wanted of several."""
    there = list(capture.manifest.get("components", {}))
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted is None or wanted not in there:
        fact = f"no calls of '{wanted}'" if wanted else f"holds calls of {len(there)} denoisers"
        raise UsageError(f"{capture.directory}: {fact}. Choose one of {', '.join(there)} with --component.")
    return wanted
