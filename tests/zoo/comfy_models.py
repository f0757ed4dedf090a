"""Models whose native names the format comfy knows, tiny with random weights, and real configurations."""

from collections.abc import Callable, Sequence
from typing import Any

import diffusers as d
import torch
from torch import Tensor, nn

from octavo.calibrate.layers.freeze import numbers_of
from octavo.calibrate.layers.inputs import DynamicInput
from octavo.calibrate.layers.modules import QuantizedLinear
from octavo.calibrate.layers.transforms import Rotate, weight_for
from octavo.calibrate.layers.weights import round_to_nearest

from .image_pipelines import IMAGES, flux_parts, qwen_image, sd3_parts, z_image
from .video_pipelines import WAN, ltx

_WAN_IMAGE = dict(image_dim=16, added_kv_proj_dim=24, in_channels=16)  # the image branch of Wan 2.1 I2V

MODELS: dict[str, Callable[[], Any]] = {
    "qwen-image": lambda: qwen_image()[0].transformer,
    "ltx": lambda: ltx()[0].transformer,
    "flux": lambda: flux_parts(guidance_embeds=True)["transformer"],
    "sd3": lambda: sd3_parts()["transformer"],
    "sd35": lambda: sd3_parts(qk_norm="rms_norm", dual_attention_layers=(0,))["transformer"],
    "wan": lambda: d.WanTransformer3DModel(**WAN | _WAN_IMAGE),
    "wan-vace": lambda: d.WanVACETransformer3DModel(**WAN, in_channels=16, vace_layers=[0], vace_in_channels=96),
    "z-image": lambda: z_image()[0].transformer,
    "flux2": lambda: IMAGES["flux2"]()[0].transformer,
    "chroma": lambda: IMAGES["chroma"]()[0].transformer,
    "auraflow": lambda: IMAGES["auraflow"]()[0].transformer,
    "krea2": lambda: IMAGES["krea2"]()[0].transformer,
    "qwen-image-2.1": lambda: d.QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=32,
        axes_dims_rope=(8, 4, 4),
    ),
}  # fmt: skip


def model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns a model of MODELS with random numbers."""
    torch.manual_seed(0)
    return randomized(MODELS[name]().to(dtype))


def randomized(module: nn.Module) -> nn.Module:
    """Gives all weights, biases and tables of `module` different random numbers, and returns `module`."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.eval().requires_grad_(False).parameters():
        random = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(random / max(parameter.shape[-1], 1) ** 0.5)
    return module


def narrow(kind: str, **config: Any) -> dict[str, Tensor]:
    """Returns random tensors with the names and the numbers of rows in a model of the diffusers class `kind` with this
    configuration, but at most two columns, so that a model of any size fits in memory."""
    with torch.device("meta"):
        tensors = getattr(d, kind)(**config).state_dict()
    generator = torch.Generator().manual_seed(0)
    shapes = {name: [tensor.shape[0], *(min(2, size) for size in tensor.shape[1:])] for name, tensor in tensors.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def integer(linear: nn.Linear, group: int | None = None) -> QuantizedLinear:
    """Returns the dynamic integer layer of `linear`, its weights rounded to nearest. `group` is the number of channels
    in a group of the rotation of its input; None for no rotation."""
    rotation = None if group is None else Rotate.by(group)
    rounded = round_to_nearest(weight_for(rotation, linear.weight))
    assert rounded is not None
    numbers = numbers_of(rounded, linear.bias, DynamicInput(), linear.weight.dtype, rotation)
    assert not isinstance(numbers, str)
    return QuantizedLinear(numbers)


def integers(module: nn.Module, group: int | None = None, keep: Sequence[str] = ()) -> dict[str, QuantizedLinear]:
    """Returns integer layers for the linear layers of `module`, by name, except for those with one of the words `keep`
    in their name. Those whose inputs have a multiple of `group` channels are rotated."""
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    return {
        name: integer(layer, group if group and layer.in_features % group == 0 else None)
        for name, layer in linears.items()
        if not any(word in name for word in keep)
    }


def eager(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, group: int | None = None
) -> Tensor:
    """Returns what comfy-kitchen 0.2.40 computes on a CPU for an int8_tensorwise layer, in the dtype of `x`.

    Unlike Octavo's layers it divides the input by the scale in the dtype of `x`, and adds the bias after the product is
    rounded to this dtype; in float32 both give the same result.
    """
    x = x if group is None else Rotate.by(group).input(x)
    scale = (x.abs().amax(-1, keepdim=True).float() / 127.0).clamp(min=1e-30)
    codes = (x / scale.to(x.dtype)).round().clamp(-128.0, 127.0)
    sums = codes.double() @ weight.double().t()  # exact: whole numbers below 2**53
    y = (sums.float() * (scale * weight_scale.view(-1))).to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def eager_fp8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Returns what comfy-kitchen 0.2.40 computes for a float8_e4m3fn layer where it computes in FP8, in the dtype of
    `x`, with exact sums.

    Unlike Octavo's layers it multiplies the input by a reciprocal of the scale that is rounded to the dtype of `x`.
    """
    codes = (x * (1.0 / input_scale).to(x.dtype)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    sums = codes.double() @ weight.double().t()
    y = sums.float() * (input_scale * weight_scale)
    return (y if bias is None else y + bias.to(x.dtype)).to(x.dtype)


def in_rows(stored: Tensor, rows: int, blocks: int) -> Tensor:
    """Returns the scales of an MXFP8 weight (rows, blocks) from their `stored` form, looked up one by one by the
    formula in the documentation of cuBLAS."""
    flat, across = stored.flatten(), -(-blocks // 4)
    row, block = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    tile = row // 128 * across + block // 4
    return flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4]
