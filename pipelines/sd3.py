"""Defines the family of Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206, 2024), whose denoiser is diffusers'
SD3Transformer2DModel."""

from typing import Any

from .family import Family, Fold, Group

_IN = ("to_q", "to_k", "to_v")
_CONTEXT_IN = ("add_q_proj", "add_k_proj", "add_v_proj")


def groups(model: Any) -> list[Group]:
    """Returns the smoothing groups (layers that share an input, with what produces it) of a model like SD3's.

    Each stream of an attention gives a group of its query, key and value layers. The attention's output layers are
    another group, and the first layer of each feed-forward is a group of its own.
    """
    groups = []
    for index, block in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{index}"
        width = block.norm2.normalized_shape[0]
        groups += _attention(block, name, width)
        groups.append(modulated(f"{name}.norm1.linear", width, 3, 4, [f"{name}.ff.net.0.proj"]))
        if block.ff_context is not None:
            groups.append(modulated(f"{name}.norm1_context.linear", width, 3, 4, [f"{name}.ff_context.net.0.proj"]))
    return groups


def _attention(block: Any, name: str, width: int) -> list[Group]:
    context = [f"{name}.attn.{leaf}" for leaf in _CONTEXT_IN if getattr(block.attn, leaf, None) is not None]
    # the last block has AdaLayerNormContinuous, which outputs scale before shift; AdaLayerNormZero: shift before scale
    shift, scale = (1, 0) if getattr(block, "context_pre_only", False) else (0, 1)
    outputs = [f"{name}.attn.to_out.0"]
    if getattr(block.attn, "to_add_out", None) is not None:
        outputs.append(f"{name}.attn.to_add_out")
    values = tuple(Fold(f"{name}.attn.{leaf}") for leaf in ("to_v", "add_v_proj"))
    groups = [
        modulated(f"{name}.norm1.linear", width, 0, 1, [f"{name}.attn.{leaf}" for leaf in _IN]),
        modulated(f"{name}.norm1_context.linear", width, shift, scale, context),
        Group(tuple(outputs), values),
    ]
    if getattr(block, "attn2", None) is not None:
        groups.append(modulated(f"{name}.norm1.linear", width, 6, 7, [f"{name}.attn2.{leaf}" for leaf in _IN]))
        groups.append(Group((f"{name}.attn2.to_out.0",), (Fold(f"{name}.attn2.to_v"),)))
    return groups


def modulated(target: str, width: int, shift: int, scale: int, layers: list[str]) -> Group:
    """Returns the smoothing group of `layers`, whose shared input is a modulated norm: norm(x) * (1 + scale) + shift.

    The group's smoothing factors are folded into the layer `target`, which computes scale and shift. The output of
    `target` consists of chunks of `width` channels, counted from 0. Chunk number `shift` is the shift, and chunk number
    `scale` the scale.
    """
    return Group(tuple(layers), (Fold(target, shift * width), Fold(target, scale * width, plus_one=True)))


SD3 = Family(
    name="sd3",
    pipelines=("StableDiffusion3",),
    defaults={"num_inference_steps": 28, "output_type": "latent"},
    keep_float={
        "pos_embed.*": "patch embedding: few operations, every token depends on it",
        "time_text_embed.*": "timestep and text embedder: one row per sample",
        "context_embedder": "text embedder: wide range of the text states",
        "norm_out.*": "output modulation: one row per sample",
        "proj_out": "output projection: its error goes into the output undamped",
    },
    groups=groups,
)
