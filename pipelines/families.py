"""Lists Octavo's defaults for diffusers' own pipelines: which layers stay float in one kind of pipeline, and the
smoothing groups.

A smoothing group names layers that share an input, and the weights that produce this input, into which the smoothing
factors of the layers can be folded. Some layers stay float in every pipeline (`general_reason` in calibrate/plan.py),
such as those that a model class itself keeps in float32. An entry here adds layers for one kind of pipeline, each with
the reason: the name of another tool that keeps the layer float, or a loss of quality that `python -m bench.models`
measured.
"""

from collections.abc import Iterator
from typing import Any

from .family import Family, Fold, Group
from .sd3 import groups as joint_groups
from .sd3 import modulated

_DOWN = "second linear of a feed-forward: float in msModelSlim's W8A8"
_LATENT = {"output_type": "latent"}


def single_groups(model: Any) -> list[Group]:
    """Returns the smoothing groups (layers that share an input, with what produces it) of a model such as Flux.

    Double blocks have one stream for the picture and one for the text, as the blocks of SD3 do. For each stream they
    give a group of the attention's query, key and value, and a group of the first layer of the feed-forward. The output
    layers of both streams are one more group. Single blocks have one stream for picture and text. Each gives a group of
    the layers that read its norm: query, key, value, and the first layer of the feed-forward.
    """
    groups = joint_groups(model)
    for index, block in enumerate(model.single_transformer_blocks):
        name, width = f"single_transformer_blocks.{index}", block.norm.norm.normalized_shape[0]
        layers = [f"{name}.proj_mlp", *(f"{name}.attn.{leaf}" for leaf in ("to_q", "to_k", "to_v"))]
        groups.append(modulated(f"{name}.norm.linear", width, 0, 1, layers))
    return groups


def qwen_groups(model: Any) -> list[Group]:
    """Returns the smoothing groups of a QwenImage transformer: layers that share an input, with what produces it."""
    groups = []
    for index, block in enumerate(model.transformer_blocks):
        name, width = f"transformer_blocks.{index}", block.img_norm1.normalized_shape[0]
        for stream, leaves in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            target = f"{name}.{stream}_mod.1"
            groups.append(modulated(target, width, 0, 1, [f"{name}.attn.{leaf}" for leaf in leaves]))
            groups.append(modulated(target, width, 3, 4, [f"{name}.{stream}_mlp.net.0.proj"]))
    return groups + list(value_groups(model))


def value_groups(model: Any) -> Iterator[Group]:
    """Yields a smoothing group for each attention in `model`: the output layers (to_out, to_add_out), whose input the
    value layers (to_v, add_v_proj) produce.

    Attention is linear in its values, so dividing the outputs of the value layers divides the input of the output
    layers. An attention whose processor has weights of its own is left out, because such a processor may add something
    to the values.
    """
    from torch import nn

    for name, module in model.named_modules():
        outputs, values = getattr(module, "to_out", None), getattr(module, "to_v", None)
        own = isinstance(getattr(module, "processor", None), nn.Module)
        if own or not isinstance(values, nn.Linear) or not isinstance(outputs, (nn.ModuleList, nn.Sequential)):
            continue
        if not isinstance(outputs[0], nn.Linear) or outputs[0].in_features != values.out_features:
            continue
        added = [leaf for leaf in ("to_add_out",) if isinstance(getattr(module, leaf, None), nn.Linear)]
        folds = [leaf for leaf in ("to_v", "add_v_proj") if isinstance(getattr(module, leaf, None), nn.Linear)]
        layers = tuple(f"{name}.{leaf}" for leaf in ("to_out.0", *added))
        yield Group(layers, tuple(Fold(f"{name}.{leaf}") for leaf in folds))


def _values(model: Any) -> list[Group]:
    return list(value_groups(model))


def unet_groups(model: Any) -> list[Group]:
    """Returns the smoothing groups of a UNet: those of its attentions (`value_groups`), and one for the input
    projection of each of its transformers, a linear layer or a convolution, whose input is the output of a norm."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    transformers = [name for name, kind in kinds.items() if kind == "Transformer2DModel"]
    return _values(model) + [Group((f"{name}.proj_in",), (Fold(f"{name}.norm"),)) for name in transformers]


TABLE = (
    Family(
        "flux", ("Flux",), defaults=_LATENT, groups=single_groups,
        more_float={"*.ff.net.2": _DOWN, "*.ff_context.net.2": _DOWN},
    ),
    Family("flux2", ("Flux2",), defaults=_LATENT),
    Family(
        "wan", ("Wan",), defaults=_LATENT, groups=_values,
        # measured: the output of a tiny WanVACE has 23 dB of SQNR with them in integers, 59 dB without
        more_float=dict.fromkeys(("vace_blocks.*.proj_in", "vace_blocks.*.proj_out"), "takes the residual stream"),
    ),
    Family(
        "hunyuanvideo", ("HunyuanVideo",), defaults=_LATENT, groups=single_groups,
        more_float={"*.ff.net.2": _DOWN, "*.ff_context.net.2": _DOWN},
    ),
    Family("hunyuanvideo15", ("HunyuanVideo15",), defaults=_LATENT),
    Family(
        "qwenimage", ("QwenImage",), defaults=_LATENT, groups=qwen_groups,
        more_float={"*.txt_mlp.net.2": "msModelSlim keeps it float in Qwen-Image-Edit"},
    ),
    Family("pixart", ("PixArt",), defaults=_LATENT, groups=_values),
    Family("sana", ("Sana",), defaults=_LATENT, groups=_values),
    Family("cogvideox", ("CogVideoX",), defaults=_LATENT, groups=_values),
    Family("ltx", ("LTX",), defaults=_LATENT, groups=_values),
    Family("ltx2", ("LTX2",), defaults=_LATENT),
    Family("sdxl", ("StableDiffusionXL",), defaults=_LATENT, groups=unet_groups),
)  # fmt: skip
