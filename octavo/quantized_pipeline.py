"""Pipelines from what `octavo generate` is given: float ones, quantized ones, and checkpoints of a denoiser alone."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from calibrate.export import REPORT_FILE
from calibrate.export.ascend import all_names
from calibrate.export.check_model import method_at, read_json
from calibrate.load import load_ascend
from calibrate.structure import QUANT_METHOD
from capture.errors import CaptureError
from pipelines.denoisers import denoisers
from pipelines.load import load_denoiser, load_pipeline, model_directory


class Origin(NamedTuple):
    """What a checkpoint is of: a float pipeline, by directory or as `demo`, and the name of one of its denoisers."""

    model: str | None
    component: str | None


def is_checkpoint(directory: Path) -> bool:
    """Whether there is a denoiser that Octavo wrote, not a pipeline."""
    if (directory / "model_index.json").is_file():
        return False
    return (
        (directory / REPORT_FILE).is_file()
        or method_at(directory) is not None
        or any(directory.glob("quant_model_description_*.json"))
    )


def origin(directory: Path) -> Origin:
    """What report.json says that the checkpoint is of."""
    if not (directory / REPORT_FILE).is_file():
        return Origin(None, None)
    report = read_json(directory / REPORT_FILE)
    return Origin(report.get("model"), report.get("component"))


def open_pipeline(
    source: str,
    model: str | None,
    component: str | None,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    **options: Any,
) -> Any:
    """The pipeline of a model directory, or that of a checkpoint with its denoiser in integers.

    `model` and `component` win over what the checkpoint says of its origin; `options` are those of `load_pipeline`.
    Raises CaptureError 2 for a checkpoint that does not say what it is of, and what loading raises.
    """
    directory = model_directory(source)
    if not is_checkpoint(directory):
        if model is not None or component is not None:
            raise CaptureError(f"{source}: a pipeline, not a checkpoint. Leave --model and --component out.", 2)
        return load_pipeline(directory, dtype=dtype, device=device, **options)
    said = origin(directory)
    model = model or said.model
    if model is None:
        raise CaptureError(f"{source}: does not say which model it is of. Give it with --model.", 2)
    name = component or said.component or "transformer"
    method = method_at(directory)
    if method is None:
        pipe = load_pipeline(model_directory(model), dtype=dtype, device=device, **options)
        _put_in(denoisers(pipe, (name,))[name], directory)
        return pipe
    if method != QUANT_METHOD:
        raise CaptureError(f"{source}: quantized by {method}. Load it with diffusers and {method}.", 2)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32  # halves are slow there
    denoiser: Any = load_denoiser(directory, dtype)
    return load_pipeline(
        model_directory(model), dtype=dtype or denoiser.dtype, device=device, given={name: denoiser}, **options
    )


def _put_in(module: torch.nn.Module, directory: Path) -> None:
    """Puts the layers of an ascend checkpoint into the float denoiser that it is of."""
    from calibrate.quantizer import adopt

    layers = load_ascend(directory)
    there = dict(module.named_modules())
    for name, layer in layers.items():
        shape = getattr(getattr(there.get(name), "weight", None), "shape", None)
        if shape != layer.weight.shape:
            fact = f"{directory}: {name} is not in {type(module).__name__} of this model, or of another shape"
            raise CaptureError(f"{fact}. Give the model it was made of with --model.", 4)
    device = next(module.parameters()).device
    adopt(module, {name: layer.to(device) for name, layer in all_names(layers, module).items()})
