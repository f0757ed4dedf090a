"""Defines the keys of a quantization_config of ModelOpt, the rules by which vLLM-Omni and SGLang match names of float
layers, and which models and layers the format holds. Importing this module needs no torch."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ...layers.schemes import FP8_DYNAMIC, FP8_STATIC
from ..native import linears_in, reason_against
from .models import PACKED, SGLANG, UNTHREADED, VLLM_OMNI, consumers, sglang_joined, written

if TYPE_CHECKING:
    from torch import nn

METHOD = "modelopt"  # quant_method in config.json
ALGO, TYPE, IGNORE = "quant_algo", "quant_type", "ignore"
NESTED, NESTED_IGNORE = "quantization", "exclude_modules"  # where older files have `quant_algo` and `ignore`
STATIC_WORD, ROWS_WORD = "FP8", "FP8_PER_CHANNEL_PER_TOKEN"  # values of ALGO
ALGOS = {FP8_STATIC: STATIC_WORD, FP8_DYNAMIC: ROWS_WORD}
FP8_DTYPE = "float8_e4m3fn"


def kept_float(model: "nn.Module", names: Collection[str], scheme: str = "") -> set[str]:
    """Returns the names of the layers that have to stay float: those that none of the consumers can hold in FP8, and
    those that a consumer joins with a layer that stays float. They are among `names`, the layers of `model` that would
    become FP8. `scheme` is their scheme; "" stands for the static one."""
    kind = type(model).__name__
    if kind not in VLLM_OMNI:
        return set()
    return set(names) - written(consumers(kind, scheme or FP8_STATIC), names, linears_in(model))


def joined(model: "nn.Module", names: Collection[str]) -> list[tuple[str, ...]]:
    """Returns the groups of the layers `names` of `model` that vLLM-Omni or SGLang joins into one matrix."""
    kind = type(model).__name__
    models = consumers(kind, FP8_STATIC) if kind in VLLM_OMNI else ()
    return [tuple(group) for consumer in models for group in consumer.joined(names).values() if len(group) > 1]


def refusal(model: str, config: Mapping[str, Any]) -> str | None:
    """Returns the reason why neither vLLM-Omni nor SGLang computes the model class `model` in FP8, and what the user
    can do; None if one of them does. `config`, the model's configuration, makes no difference."""
    return reason_against(model, VLLM_OMNI, UNTHREADED, "vLLM-Omni or SGLang") or None


def algorithm(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the algorithm and the names of the float layers in a quantization_config, None for what is missing."""
    nested = config.get(NESTED)
    if ALGO not in config and isinstance(nested, dict):
        return nested.get(ALGO), nested.get(NESTED_IGNORE)
    return config.get(ALGO), config.get(IGNORE)


def ignored(kind: str, scheme: str, linears: Sequence[str], codes: Collection[str]) -> list[str]:
    """Returns the entry `ignore` of the quantization_config: the names of all float layers, in diffusers and in each
    runtime that reads the checkpoint. `kind` is the class of the model, `linears` are the names of all its linear
    layers in diffusers, and `codes` those of the layers in FP8. `scheme` is the scheme of the FP8 layers; only static
    ones are written for SGLang besides vLLM-Omni.

    vLLM-Omni keeps every layer float whose name contains an entry: "proj_out" would also keep each
    single_transformer_blocks.N.proj_out. If an entry would keep an FP8 layer float in this way, a * is appended to the
    entry. vLLM-Omni and SGLang compare an entry with a * only with the beginning of a name, so it keeps no other layer
    float. The * is also appended to the other names of the same layer, and to the names of the layers that vLLM-Omni
    joins with it.
    """
    vllm, models = VLLM_OMNI[kind], consumers(kind, scheme)
    held = {vllm.name(name) for name in codes if vllm.holds(name)}
    groups: dict[str, set[str]] = defaultdict(set)
    for name in linears:
        if name not in codes:
            groups[vllm.name(name)] |= {name, *(model.name(name) for model in models)}
    entries: set[str] = set()
    for group in groups.values():
        caught = any(entry in prefix for entry in group for prefix in held)
        entries |= {f"{entry}*" for entry in group} if caught else group
    return sorted(entries)


def ignored_by_vllm_omni(kind: str, name: str, entries: Iterable[str]) -> bool:
    """Returns whether vLLM-Omni keeps a layer of the model class `kind` float because of `entries`, the content of
    `ignore` in the quantization_config. It does if an entry is part of vLLM-Omni's name of the layer, or is a pattern
    with * that matches this name. `name` is the layer's name in diffusers."""
    own = VLLM_OMNI[kind].name(name) if kind in VLLM_OMNI else name
    return any(entry in own or fnmatchcase(own, entry) for entry in entries)


def ignored_by_sglang(kind: str, name: str, entries: Sequence[str]) -> bool | None:
    """Returns whether SGLang keeps a layer of the model class `kind` float because of `entries`, the content of
    `ignore` in the quantization_config. It does if an entry, with * for any text, matches SGLang's whole name of the
    layer. It also does if SGLang joins the layer with others, such as to_q, to_k and to_v, and entries match the names
    of all of them in diffusers. Returns None if entries match only some of these names, because SGLang then stops with
    a ValueError. `name` is the layer's name in diffusers."""
    if kind not in SGLANG:
        return _matched(name, entries)
    if _matched(SGLANG[kind].name(name), entries):
        return True
    own = sglang_joined(kind).name(name)
    if not own.endswith(PACKED.get(kind, ())):
        return False
    stem, leaf = name.rpartition(".")[::2]
    leaves = next(group for group in _MEMBERS if leaf in group)
    matches = {_matched(f"{stem}.{member}", entries) for member in leaves}
    return None if len(matches) == 2 else matches == {True}


_MEMBERS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("w1", "w3"))


def _matched(name: str, entries: Iterable[str]) -> bool:
    return any(
        entry == name or ("*" in entry and re.fullmatch(re.escape(entry).replace(r"\*", ".*"), name))
        for entry in entries
    )
