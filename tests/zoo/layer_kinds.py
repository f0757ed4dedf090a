"""Integer layers of every scheme, built directly, and a small denoiser with a timestep argument."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.manifest import MANIFEST
from octavo.calibrate.layers.inputs import RULES, DynamicInput, FloatInput, Input, StaticInput, TimestepInput
from octavo.calibrate.layers.modules import QuantizedLayer, build
from octavo.calibrate.layers.scheme import ACTIVATION, QParams, Range, qparams_of
from octavo.calibrate.plan import Plan
from octavo.calibrate.result import Result

from .toy import nearest

EDGES = (250.0, 500.0, 750.0)
SCHEDULE = (1000.0, 800.0, 500.0, 499.5, 300.0, 20.0)  # noise levels of a deployment, two of them in one bin
RANGES = (Range(-4.0, 4.0), Range(-2.0, 3.0), Range(0.0, 2.0), Range(-1.0, 0.5))


class TimedToy(nn.Module):
    """A denoiser that takes the noise level but does not use it."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Conv2d(1, 2, 3, padding=1)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)
        self.out = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, hidden: Tensor, timestep: Any, extra: Any = None) -> Tensor:
        x = self.patch(hidden.unsqueeze(1)).mean(1) + hidden
        x = x + self.down(nn.functional.silu(self.up(self.norm(x))))
        return self.out(x)


def stacked(dtype: torch.dtype) -> QParams:
    """Returns the scales and zero points of RANGES, stacked as in one W8A8_TIMESTEP layer."""
    qparams = [qparams_of(extent, ACTIVATION, dtype) for extent in RANGES]
    return QParams(torch.stack([q.scale for q in qparams]), torch.stack([q.zero_point for q in qparams]))


def static(extent: Range, dtype: torch.dtype) -> StaticInput:
    """Returns the static input quantization of a range."""
    qparams = qparams_of(extent, ACTIVATION, dtype)
    assert qparams is not None
    return StaticInput(qparams)


def input_of(kind: str, dtype: torch.dtype, clamping: bool = False) -> Input:
    """Returns the input quantization of a layer of this scheme; with `clamping`, as Ascend's for MXFP8."""
    inputs: dict[str, Input] = {
        "W8A8": static(RANGES[0], dtype),
        "W8A8_TIMESTEP": TimestepInput(stacked(dtype), torch.tensor(EDGES)),
        "W8A8_DYNAMIC": DynamicInput(),
        "W8A16": FloatInput(),
        "W8A8_MXFP8": DynamicInput(scheme=replace(RULES["W8A8_MXFP8"], clamping=clamping)),
    }
    return inputs[kind]


def frozen(module: nn.Module, kind: str, clamping: bool = False, **options: Any) -> QuantizedLayer:
    """Returns an integer layer of this scheme for a float layer."""
    return build(nearest(module.weight, module.bias, input_of(kind, module.weight.dtype, clamping), **options), module)


def static_of(module: nn.Module, index: int) -> QuantizedLayer:
    """Returns the W8A8 layer with the range of one timestep bin."""
    return build(nearest(module.weight, module.bias, static(RANGES[index], module.weight.dtype)), module)


def layers_of(model: nn.Module, kinds: dict[str, str], **options: Any) -> dict[str, QuantizedLayer]:
    """Returns the integer layers of a model for these schemes, by name."""
    return {name: frozen(model.get_submodule(name), kind, **options) for name, kind in kinds.items()}


def written(
    folder: Path, model: nn.Module, layers: dict[str, QuantizedLayer], timesteps: tuple[float, ...] | None = SCHEDULE
) -> Path:
    """Exports these layers in the format ascend."""
    return export(Result(Plan(()), layers, {}, timesteps), model, folder)


def content(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file of a folder except the manifest, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def unlisted(folder: Path) -> None:
    """Deletes the manifest, so that the checks behind it can be tested."""
    (folder / MANIFEST).unlink(missing_ok=True)


def changed(
    folder: Path, change: Callable[[dict[str, Tensor]], object], metadata: dict[str, str] | None = None
) -> None:
    """Rewrites the weights file with changed tensors or more metadata, and deletes the manifest."""
    unlisted(folder)
    path = next(folder.glob("*.safetensors"))
    with safe_open(path, "pt") as opened:
        before = opened.metadata()
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file({key: tensor for key, tensor in tensors.items() if tensor.numel()}, path, before | (metadata or {}))
    path.chmod(0o400)
