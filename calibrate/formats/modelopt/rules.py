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
    """Returns the names of the layers that have to stay float because none of the consumers can hold them in FP8, or
    one of them joins them with such a layer. They are among `names`, the layers of `model` that would become FP8.
    `scheme` is their scheme; "" stands for the static one."""
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
    """Returns the entry `ignore` of the quantization_config: the names of all float layers, by their names in diffusers
    and in each consumer. `linears` are the names of all linear layers of the model class `kind`, `codes` those of the
    layers in FP8.

    vLLM-Omni also keeps each layer float whose name contains an entry: "proj_out" would be every
    single_transformer_blocks.N.proj_out. Such entries, and those of the layers joined with them, get a * at the end. An
    entry with a * has to match the name from its beginning in both consumers, and here matches nothing else.
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
    """Returns whether vLLM-Omni keeps the layer `name` of diffusers float because of `entries`: one of them is part of
    vLLM-Omni's name of the layer, or a pattern that matches it."""
    own = VLLM_OMNI[kind].name(name) if kind in VLLM_OMNI else name
    return any(entry in own or fnmatchcase(own, entry) for entry in entries)


def ignored_by_sglang(kind: str, name: str, entries: Sequence[str]) -> bool | None:
    """Returns whether SGLang keeps the layer `name` of diffusers float because of `entries`: one of them matches
    SGLang's whole name of the layer, with * for any text; or, if SGLang joins the layer with others, all of these are
    matched. Returns None if some are and some are not, which ends loading with a ValueError."""
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
