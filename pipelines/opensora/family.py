"""The record of the family Open-Sora 1.2: loading, layers that stay float, and layers whose inputs can be divided."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..family import Family, Fold, Group
from .defaults import KEEP_FLOAT

_SHIFT, _SCALE, _MLP_SHIFT, _MLP_SCALE = 0, 1, 3, 4  # rows of a table, chunks of t_block


def groups(model: Any) -> list[Group]:
    """The groups of an STDiT3: one before each output projection, and groups across all blocks.

    All blocks take their modulation from one t_block, and their captions from one embedder, whose outputs can only be
    divided by the same factors for all blocks. cross_attn.q_linear is in no group: its input, the residual stream,
    cannot be divided for one layer alone.
    """
    width = model.config["hidden_size"]
    blocks = list(_blocks(model))
    found = []
    for name in blocks:
        found.append(Group((f"{name}.attn.proj",), (Fold(f"{name}.attn.qkv", 2 * width),)))
        found.append(Group((f"{name}.cross_attn.proj",), (Fold(f"{name}.cross_attn.kv_linear", width),)))
    found.append(_modulated(blocks, "attn.qkv", width, _SHIFT, _SCALE))
    found.append(_modulated(blocks, "mlp.fc1", width, _MLP_SHIFT, _MLP_SCALE))
    if not model.config["skip_y_embedder"]:
        captions = tuple(f"{name}.cross_attn.kv_linear" for name in blocks)
        found.append(Group(captions, (Fold("y_embedder.y_proj.fc2"),)))
    return found


def _blocks(model: Any) -> Iterator[str]:
    for kind in ("spatial_blocks", "temporal_blocks"):
        yield from (f"{kind}.{at}" for at in range(len(getattr(model, kind))))


def _modulated(blocks: list[str], layer: str, width: int, shift: int, scale: int) -> Group:
    """The group of `layer` in all blocks. 1 + table + t is divided as (1 + table) / s + t / s: the table alone has the
    1."""
    folds = [Fold("t_block.1", shift * width), Fold("t_block.1", scale * width)]
    for name in blocks:
        table = f"{name}.scale_shift_table"
        folds += [Fold(table, shift * width), Fold(table, scale * width, plus_one=True)]
    return Group(tuple(f"{name}.{layer}" for name in blocks), tuple(folds))


def _load(directory: Path, dtype: Any, text_encoder: Path | None) -> Any:
    from .load import load_pipeline

    return load_pipeline(directory, torch_dtype=dtype, text_encoder=text_encoder)


OPENSORA = Family(
    name="opensora",
    pipelines=("OpenSora",),
    models=("STDiT3",),
    defaults={"num_inference_steps": 30, "output_type": "latent"},
    keep_float=dict.fromkeys(KEEP_FLOAT, "outside the blocks: a few rows a call, or the velocity itself"),
    load=_load,
    groups=groups,
)
