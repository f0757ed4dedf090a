"""Finds the model that a capture was recorded from, checks by the fingerprint that it is the captured model, and casts
captured calls to the dtype in which the quantized model will run."""

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
    """A denoiser to be calibrated from a capture: the capture, the denoiser's name in the pipeline, the model family,
    and the calls to replay, of which there are `count`."""

    capture: Capture
    component: str
    family: Family
    calls: Calls
    count: int


def origin_of(captured: Captured, options: CalibrateOptions) -> dict[str, Any]:
    """Returns entries for report.json: `model`, the directory of the float model, or "demo" for the bundled pipeline;
    `component`, the denoiser that was quantized; `loras`, the captured model's LoRA files, if it has any; `dtype`, the
    dtype in which the quantized model will run, only if --dtype is given."""
    source = source_of(captured.capture, options)
    origin = {"model": source if source == "demo" else str(Path(source).resolve()), "component": captured.component}
    loras = captured.capture.manifest.get("loras")
    return origin | ({"loras": loras} if loras else {}) | ({"dtype": options.dtype} if options.dtype else {})


def source_of(capture: Capture, options: CalibrateOptions) -> str:
    """Returns the directory of the captured model, or "demo" for the bundled pipeline: the value of --model, or else
    the model that the capture names. Raises UsageError without --model if the capture names no model."""
    source = options.model or capture.manifest.get("model")
    if source is None:
        fact = "does not say which model it was recorded from"
        raise UsageError(f"{capture.directory}: {fact}. Give the model with --model.")
    return str(source)


def _only_denoiser(capture: Capture, options: CalibrateOptions) -> str:
    """Returns the name of the captured model's only denoiser. Raises UsageError if the model has several."""
    source = source_of(capture, options)
    index = model_directory(source) / "model_index.json"
    names = (denoisers_in(read_json(index)) if index.is_file() else []) or ["transformer"]
    if len(names) > 1:
        fact = f"does not say which denoiser of {source} it was recorded from"
        raise UsageError(f"{capture.directory}: {fact}. Choose one of {', '.join(names)} with --component.")
    return names[0]


def check_fingerprint(capture: Capture, component: str, now: dict[str, str], source: str, allow_revision: bool) -> None:
    """Raises MisfitError unless `now`, the fingerprint of a model (its class, and digests of tensor names and weights),
    equals the fingerprint of the captured denoiser `component`.

    `source` is the model's directory, for the message. With `allow_revision`, other weights are accepted. A capture
    that was converted from a .pth file has no fingerprint, and fits any model.
    """
    was = capture.manifest.get("components", {}).get(component)
    if was is None:  # a converted .pth file has no fingerprint; calls that do not fit fail when they are replayed
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
    """Returns a function that casts the arguments of a captured call to `dtype`, in which the quantized model will run.

    The function casts only tensors that have the dtype of the captured model. If `dtype` is None, the function changes
    nothing.
    """
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
    """Returns the names of the denoisers to quantize: the denoiser that --component names, or all that were captured.

    A capture that was converted from a .pth file does not name its denoiser. For such a capture without --component,
    the model's only denoiser is taken; UsageError is raised if the model has several. Also raises UsageError if
    --component names a denoiser that was not captured, MisfitError for a denoiser without stored calls.
    """
    names, wanted = list(capture.manifest.get("components", {})), options.component
    if not names:
        return [wanted or _only_denoiser(capture, options)]
    if wanted is not None and wanted not in names:
        fact = f"has no calls of '{wanted}'"
        raise UsageError(f"{capture.directory}: {fact}. Choose one of {', '.join(names)} with --component.")
    chosen = names if wanted is None else [wanted]
    called = {header.component for unit in capture.units for header in unit.calls}
    if missing := [name for name in chosen if name not in called]:
        remedy = "Capture with more --steps" + (", or choose another with --component" if len(names) > 1 else "")
        raise MisfitError(f"{capture.directory}: has no calls of '{missing[0]}'. {remedy}.")
    return chosen
