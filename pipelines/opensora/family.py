"""Defines Octavo's defaults for Open-Sora 1.2: how to load it, which layers stay float, and its smoothing groups."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..family import Family, Fold, Group
from .defaults import KEEP_FLOAT

_SHIFT, _SCALE, _MLP_SHIFT, _MLP_SCALE = (
    0,
    1,
    3,
    4,
)  # indices of rows in a scale_shift_table, and of chunks in the output of t_block


def groups(model: Any) -> list[Group]:
    """Returns the smoothing groups of an STDiT3: layers that share smoothing factors, with the weights that the factors
    are folded into.

    Each output projection is a group of its own. The other groups span all blocks, because all blocks get their
    modulation from one t_block and their captions from one embedder, whose outputs can only be divided by factors that
    all blocks share. cross_attn.q_linear is in no group: its input is the residual stream, which other layers read too.
    """
    width = model.config["hidden_size"]
    blocks = list(_blocks(model))
    groups = []
    for name in blocks:
        groups.append(Group((f"{name}.attn.proj",), (Fold(f"{name}.attn.qkv", 2 * width),)))
        groups.append(Group((f"{name}.cross_attn.proj",), (Fold(f"{name}.cross_attn.kv_linear", width),)))
    groups.append(_modulated(blocks, "attn.qkv", width, _SHIFT, _SCALE))
    groups.append(_modulated(blocks, "mlp.fc1", width, _MLP_SHIFT, _MLP_SCALE))
    if not model.config["skip_y_embedder"]:
        captions = tuple(f"{name}.cross_attn.kv_linear" for name in blocks)
        groups.append(Group(captions, (Fold("y_embedder.y_proj.fc2"),)))
    return groups


def _blocks(model: Any) -> Iterator[str]:
    for kind in ("spatial_blocks", "temporal_blocks"):
        yield from (f"{kind}.{index}" for index in range(len(getattr(model, kind))))


def _modulated(blocks: list[str], layer: str, width: int, shift: int, scale: int) -> Group:
    """Returns the smoothing group of `layer`, a name within a block, in all `blocks`. The output of t_block consists of
    chunks of `width` channels; chunk number `shift` is the shift, and chunk number `scale` the scale, of the norm
    before `layer`.

    A block scales its norm by 1 + table + t, where `table` is its own parameter and t the output of t_block. Divided by
    the smoothing factors s, this is (1 + table) / s + t / s. So the fold into each table has the flag `plus_one`, which
    makes it divide 1 + table; the fold into t_block divides only t.
    """
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
    keep_float=dict.fromkeys(KEEP_FLOAT, "outside the blocks: few rows, or the predicted velocity itself"),
    load=_load,
    groups=groups,
)
