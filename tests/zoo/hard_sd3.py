"""A small SD3 transformer and its calls; outliers make it hard to quantize."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.replay.sqnr import Power, outputs
from octavo.calibrate.result import Result
from octavo.calibrate.settings import Settings
from octavo.capture.ranks import ALONE, Ranks
from octavo.pipelines.sd3 import SD3

from .random_sd3 import put_outliers

FEW = {"adaround": 10, "admm": 14, "easy-quant": 6}  # iterations of each rounding method


class Call(NamedTuple):
    """One call of the transformer, for prompt `unit` at `step`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    unit: int
    step: int


def hard(seed: int = 0, outliers: int = 2, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """Builds a transformer of two blocks and 32 channels; `outliers` channels before each attention and feed-forward
    are 50 times as large."""
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    model.eval().requires_grad_(False)
    if outliers:
        put_outliers(model, seed, outliers)
    return model.to(dtype)


def prompts(
    units: int = 8, steps: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32, first: int = 0
) -> list[Call]:
    """Returns calls of several prompts, each at the noise levels of `steps` steps. `first` is the number of the first
    prompt."""
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for unit in range(first, first + units):
        text, pooled = torch.randn(2, 12, 24, generator=generator), torch.randn(2, 16, generator=generator)
        for step in range(steps):
            level = 1 - step / steps
            x = level * torch.randn(2, 4, 8, 8, generator=generator) + (1 - level) * pooled[:, :4, None, None]
            tensors = {"hidden_states": x, "encoder_hidden_states": text, "pooled_projections": pooled}
            kwargs = {name: value.to(dtype) for name, value in tensors.items()}
            kwargs |= {"timestep": torch.full((2,), 1000 * level), "return_dict": False}
            calls.append(Call((), kwargs, unit, step))
    return calls


def calibrated(model: nn.Module, calls: Sequence[Call], ranks: Ranks = ALONE, **settings: Any) -> Result:
    """Calibrates with the settings of the command, but with few iterations."""
    chosen = {"defaults": SD3.keep_float, "groups": SD3.groups, "iterations": FEW, "sqnr_calls": 2} | settings
    return calibrate(model, lambda: calls, Settings(**chosen), ranks=ranks)


def sqnr(model: nn.Module, layers: Mapping[str, QuantizedLayer], calls: Sequence[Call]) -> float:
    """Returns the SQNR in dB of the quantized model's output over the calls."""
    power = Power()
    exact = outputs(model, calls)
    with quantized(model, layers):
        for one, other in zip(exact, outputs(model, calls), strict=True):
            power.add(one[0], other[0])
    assert power.sqnr is not None
    return power.sqnr


def bits(layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """Returns every tensor of the layers by name."""
    return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Returns whether two sets of tensors are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
