"""Makes the tensors by which a file in the format `comfy` asks for integer attention.

ComfyUI from 0.38 on reads MODULE.comfy_attention.config, the bytes of a JSON object, and then computes the attention of
that module in int8 where comfy-kitchen has a kernel for the GPU. An earlier version reports the tensor as unexpected,
and ignores it.
"""

import json
from collections.abc import Collection, Iterable
from itertools import takewhile

import torch
from torch import nn

from octavo.capture.tensors import Planned

from ...attention.names import COMFY_INT8
from ...layers.modules import QuantizedLayer
from .names import family_of, native_names
from .structure import ATTENTION

_WITHOUT = ("SD3Transformer2DModel", "AuraFlowTransformer2DModel")  # ComfyUI's models whose attention reads no config


def attention_tensors(modules: Collection[str], model: nn.Module) -> tuple[dict[str, Planned], dict[str, str]]:
    """Makes the tensor `comfy_attention.config` for the attention `modules` of `model`, named as in diffusers. Returns
    two dicts: from native name to tensor; and, for the modules whose attention in ComfyUI does not read this tensor,
    from module to the reason why it gets none.

    A module's native name is what the native names of all its parameters have in common: the module that holds query,
    key and value. Raises UsageError for a model without native names.
    """
    family = family_of(model)
    tensors: dict[str, Planned] = {}
    refused: dict[str, str] = {}
    owners: dict[str, list[str]] = {}
    for native, rows in native_names(_tensor_names(model), family).items():
        for name in rows.names:
            owners.setdefault(name, []).append(native.rpartition(".")[0])
    for module in modules:
        natives = {native for name, all in owners.items() if name.startswith(f"{module}.") for native in all}
        owner = _common(natives)
        if type(model).__name__ in _WITHOUT:
            refused[module] = f"belongs to {family.title}, whose attention reads no {ATTENTION} in ComfyUI"
        elif not owner:
            refused[module] = f"has no module of its own in ComfyUI's {family.title}"
        else:
            data = torch.tensor(list(json.dumps({"attention": COMFY_INT8}).encode()), dtype=torch.uint8)
            tensors[f"{owner}.{ATTENTION}"] = Planned.of(data)
    return tensors, refused


def _tensor_names(model: nn.Module) -> list[str]:
    """Returns the names of the tensors of `model`; of a quantized layer in it, those of the weight and the bias."""
    modules = model.named_modules(remove_duplicate=False)
    layers = {name for name, module in modules if isinstance(module, QuantizedLayer)}
    parts = ((name, *name.rpartition(".")[::2]) for name in model.state_dict())
    return [name for name, owner, leaf in parts if owner not in layers or leaf in ("weight", "bias")]


def _common(names: Iterable[str]) -> str:
    """Returns the module that holds all of the layers `names`; for one layer, the module around it."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
