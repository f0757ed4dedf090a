"""Parts that tiny pipelines share: schedulers, autoencoders, embeddings and pictures."""

import inspect
from typing import Any

import diffusers
import torch

PipelineCase = tuple[Any, dict[str, Any]]  # a pipeline and the arguments of a call of it


def built(kind: str, **parts: Any) -> Any:
    """Builds a diffusers pipeline with these components. All other required components are None."""
    pipeline_class = getattr(diffusers, kind)
    needed = inspect.signature(pipeline_class.__init__).parameters.values()
    absent = {p.name: None for p in needed if p.default is p.empty and p.name not in (*parts, "self")}
    pipe = pipeline_class(**absent, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randn(*shape: int) -> torch.Tensor:
    """Returns normal random numbers that depend only on the shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def ones(*shape: int) -> torch.Tensor:
    """Returns ones in int64, the dtype of attention masks and token numbers."""
    return torch.ones(*shape, dtype=torch.long)


def prompts(*shape: int, masked: bool = False, length: int | None = None) -> dict[str, Any]:
    """Returns embeddings of a prompt and of a negative prompt; `masked` adds attention masks."""
    embeds: dict[str, Any] = {"prompt_embeds": randn(*shape), "negative_prompt_embeds": randn(*shape) * 0.5}
    if masked:
        embeds |= {"prompt_attention_mask": ones(*shape[:2]), "negative_prompt_attention_mask": ones(*shape[:2])}
    return embeds if length is None else embeds | {"max_sequence_length": length}


def flow(**config: Any) -> Any:
    """Returns the flow-matching Euler scheduler."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def autoencoder(channels: int = 4, **config: Any) -> Any:
    """Builds an AutoencoderKL of two small blocks."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, layers_per_block=1, **config,
    )  # fmt: skip


def wan_vae(**config: Any) -> Any:
    """Builds Wan's video autoencoder with the fewest channels."""
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], **config
    )


def image(size: int = 16) -> torch.Tensor:
    """Returns a picture (1, 3, size, size) with values from 0 to 1."""
    return randn(1, 3, size, size).sigmoid()
