"""Random SD3 transformers, and outliers that make a model hard to quantize without changing its output."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from octavo.pipelines.family import Group
from octavo.pipelines.sd3 import groups

from .folding import fold

CHANNELS, FACTOR = 8, 50.0


class Call(NamedTuple):
    """One call of a transformer."""

    args: tuple
    kwargs: dict


def random_sd3(seed: int, modulation: float = 1.0, heads: int = 8, head: int = 32) -> SD3Transformer2DModel:
    """Builds a transformer of four blocks with default initialisation; `modulation` multiplies the weights and biases
    of the adaLN modulations."""
    torch.manual_seed(seed)
    width = heads * head
    model = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=head,
        num_attention_heads=heads, joint_attention_dim=256, caption_projection_dim=width, pooled_projection_dim=128,
        pos_embed_max_size=32,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm1_context):
                norm.linear.weight.mul_(modulation)
                norm.linear.bias.mul_(modulation)
    return model


def random_calls(count: int, seed: int, batch: int = 2, tokens: int = 77) -> list[Call]:
    """Returns calls of `random_sd3` at 32x32 latents, each with a prompt and a noise level of its own.

    As in a rectified flow, the latents are (1 - sigma) * clean + sigma * noise. The clean latents and the text
    embeddings differ in scale from prompt to prompt.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    calls = []
    for index in range(count):
        sigma = 1 - index / count
        clean, text = (float(torch.exp(0.5 * normal(1))) for _ in range(2))
        kwargs = {
            "hidden_states": (1 - sigma) * clean * normal(batch, 16, 32, 32) + sigma * normal(batch, 16, 32, 32),
            "encoder_hidden_states": text * normal(batch, tokens, 256),
            "pooled_projections": text * normal(batch, 128),
            "timestep": torch.full((batch,), 1000.0 * sigma),
            "return_dict": False,
        }
        calls.append(Call((), kwargs))
    return calls


def put_outliers(model: nn.Module, seed: int, channels: int = CHANNELS, factor: float = FACTOR) -> None:
    """Multiplies `channels` input channels of each attention and feed-forward by `factor`, without changing the model's
    output.

    The model is an SD3Transformer2DModel. The weights that read these channels are divided by `factor`.
    """
    generator = torch.Generator().manual_seed(seed)
    folds: list[tuple[Group, torch.Tensor]] = []
    for group in _behind_norms(groups(model)):
        divisors = torch.ones(model.get_submodule(group.layers[0]).in_features)
        divisors[torch.randperm(len(divisors), generator=generator)[:channels]] = 1 / factor
        folds.append((group, divisors))
    fold(model, folds)


def _behind_norms(candidates: Sequence[Group]) -> list[Group]:
    return [group for group in candidates if any(target.plus_one for target in group.folds)]
