"""Tiny models of several families with random weights and integer layers, for the proofs of consumers."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers as d
import torch
from torch import Tensor, nn

from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.record import Deployment
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.layers.noise_level import NoiseLevel
from octavo.calibrate.layers.schemes import BLOCK, MXFP8, SCHEMES
from octavo.capture.files import Modes
from tests.zoo import image_pipelines, pipelines
from tests.zoo.fp8_layers import fp8_layer
from tests.zoo.hard_sd3 import hard
from tests.zoo.layer_kinds import frozen

from .consumer_jobs import LEVEL, REFERENCE

ROWS, AXES = 64, 2  # rows and axes of the input of a layer
REFUSING = (
    "sdnq",
)  # formats that refuse layers that the runtime holds only as float, instead of writing them as float
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "sd3": lambda: hard(),
    "flux": lambda: pipelines.flux()[0].transformer,
    "flux2": lambda: image_pipelines.flux2()[0].transformer,
    "qwen_image": lambda: image_pipelines.qwen_image()[0].transformer,
    "wan": lambda: d.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16, text_dim=32, freq_dim=256,
        ffn_dim=64, num_layers=2,
    ),
    "z_image": lambda: image_pipelines.z_image()[0].transformer,
}  # fmt: skip
# the models whose layers have too few inputs for blocks, made wider
WIDER: dict[str, Callable[[], nn.Module]] = {
    "flux": lambda: d.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(8, 8, 16),
    ),
}  # fmt: skip
TITLES = {
    "sd3": "Stable Diffusion 3", "flux": "Flux.1", "flux2": "Flux.2", "qwen_image": "Qwen-Image", "wan": "Wan 2.1",
    "z_image": "Z-Image",
}  # fmt: skip


def written(family: str, format_name: str, scheme: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Writes a tiny model of `family` to `folder` in the format called `format_name`, with all linear layers but one in
    codes of this `scheme` (in MXFP8, those whose number of inputs 32 divides), and beside it the layers, with an input
    and Octavo's output of each. Returns the float model."""
    torch.manual_seed(0)
    make = WIDER.get(family, FAMILIES[family]) if scheme == MXFP8 else FAMILIES[family]
    model = make().eval().requires_grad_(False).to(dtype)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if scheme == MXFP8:
        names = [name for name in names if model.get_submodule(name).in_features % BLOCK == 0]
    record = format_named(format_name)
    kept = record.kept_float(model, names, scheme) if format_name in REFUSING else ()

    def made(module: nn.Module) -> QuantizedLayer:
        return frozen(module, scheme, record.clamping) if scheme in (*SCHEMES, MXFP8) else fp8_layer(module, scheme)

    layers = {name: made(model.get_submodule(name)) for name in names[:-2] if name not in kept}
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    deployment = Deployment(None, None, {}, dict.fromkeys(layers, AXES), 10**5, {})
    record.write(layers, model, folder, Modes(), deployment)
    biases = {name: model.get_submodule(name).bias for name in layers}
    torch.save(
        {name: _reference(layer) | {"bias": biases[name]} for name, layer in layers.items()}, folder.parent / REFERENCE
    )
    return model


@torch.inference_mode()
def _reference(layer: QuantizedLayer) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    layer.noise_level = NoiseLevel.of(torch.tensor(LEVEL))
    x = torch.randn(ROWS, layer.weight.shape[1], generator=generator).to(layer.dtype)
    tensors: Mapping[str, Tensor] = {key: value.detach().clone() for key, value in layer.state_dict().items()}
    return {"scheme": layer.scheme, "tensors": dict(tensors), "x": x, "y": layer(x).clone()}
