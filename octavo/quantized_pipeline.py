"""Pipelines from what `octavo generate` is given: float ones, quantized ones, and checkpoints of a denoiser alone."""

from pathlib import Path
from typing import Any

import torch

from octavo.calibrate.formats.ascend.checkpoint import Checkpoint
from octavo.calibrate.formats.ascend.read import read_layer
from octavo.calibrate.formats.diffusers.directory import method_at
from octavo.calibrate.formats.diffusers.structure import QUANT_METHOD
from octavo.calibrate.formats.export import REPORT_FILE
from octavo.calibrate.layers.install import all_names
from octavo.capture.errors import UsageError
from octavo.pipelines.denoisers import denoisers
from octavo.pipelines.load import load_denoiser, load_pipeline, model_directory

from .deployed import difference, of_another, report_at


def is_checkpoint(directory: Path) -> bool:
    """Whether there is a denoiser that Octavo wrote, not a pipeline."""
    if (directory / "model_index.json").is_file():
        return False
    return (
        (directory / REPORT_FILE).is_file()
        or method_at(directory) is not None
        or any(directory.glob("quant_model_description_*.json"))
    )


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
    Raises UsageError for a checkpoint that does not say what it is of, and what loading raises.
    """
    directory = model_directory(source)
    if not is_checkpoint(directory):
        if model is not None or component is not None:
            raise UsageError(f"{source}: a pipeline, not a checkpoint. Leave --model and --component out.")
        return load_pipeline(directory, dtype=dtype, device=device, **options)
    said = report_at(directory)
    model = model or said.get("model")
    if model is None:
        raise UsageError(f"{source}: does not say which model it is of. Give it with --model.")
    name = component or said.get("component") or "transformer"
    method = method_at(directory)
    if method is None:
        pipe = load_pipeline(model_directory(model), dtype=dtype, device=device, **options)
        _put_in(denoisers(pipe, (name,))[name], directory)
        return pipe
    if method != QUANT_METHOD:
        raise UsageError(f"{source}: quantized by {method}. Load it with diffusers and {method}.")
    if dtype is None and device.type == "cpu":
        dtype = torch.float32  # halves are slow there
    denoiser: Any = load_denoiser(directory, dtype)
    return load_pipeline(
        model_directory(model), dtype=dtype or denoiser.dtype, device=device, given={name: denoiser}, **options
    )


def _put_in(module: torch.nn.Module, directory: Path) -> None:
    """Puts the layers of an ascend checkpoint into the float denoiser that it is of."""
    from octavo.calibrate.formats.diffusers.quantizer import adopt

    checkpoint = Checkpoint(directory)
    fact = difference(checkpoint, module)
    if fact is not None:
        raise of_another(directory, fact)
    device = next(module.parameters()).device
    layers = {name: read_layer(checkpoint, name).to(device) for name in checkpoint.layer_names}
    adopt(module, all_names(layers, module))
