"""Tiny SD3 transformers, calibrated and exported for diffusers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

import octavo  # noqa: F401 - it registers
from octavo.calibrate.formats.export import export
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.replay.sqnr import outputs
from octavo.calibrate.result import Result

from .hard_sd3 import Call, calibrated, hard, prompts
from .layer_kinds import unlisted

WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"


class Exported(NamedTuple):
    """An exported checkpoint, with the model, the result and the calls of its calibration."""

    folder: Path
    model: nn.Module
    result: Result
    calls: list[Call]


def exported(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    formats: tuple[str, ...] = ("ascend", "diffusers"),
    **settings: Any,
) -> Exported:
    """Calibrates a tiny SD3 transformer and exports it in these formats."""
    model, calls = hard(dtype=dtype), prompts(3, 2, dtype=dtype)
    result = calibrated(model, calls, **settings)
    export(result, model, folder, formats)
    return Exported(folder, model, result, calls)


def load(folder: Path, **options: Any) -> SD3Transformer2DModel:
    """Loads the checkpoint with diffusers."""
    return SD3Transformer2DModel.from_pretrained(folder, **options)


def integer_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Returns the integer layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def run(model: nn.Module, calls: list[Call]) -> Tensor:
    """Returns the outputs of all calls, flattened into one tensor."""
    return torch.cat([output[0].flatten() for output in outputs(model, calls)])


def reconfigured(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the content of config.json and deletes the manifest."""
    unlisted(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.unlink()
    path.write_text(json.dumps(config))
