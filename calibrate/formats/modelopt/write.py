"""Writes the format `modelopt`: a transformer directory that vLLM-Omni and SGLang-diffusion load on CUDA as an FP8
model of NVIDIA's ModelOpt.

An FP8 layer X has X.weight in float8_e4m3fn, and X.bias if its float layer has one. A static layer has X.weight_scale
and X.input_scale, float32 (1,) each; a dynamic one X.weight_scale, float32 (out,), which only vLLM-Omni loads. All
other tensors are float. The scales of Wan's feed-forward layers stand a second time under vLLM-Omni's names of these
layers, which SGLang skips. The key `ignore` of the quantization_config lists the float layers. A layer that none of the
consumers can hold in FP8 is written in float: its weight is codes times scale, in the dtype of the model.

Both consumers compute layers that they join with the largest input_scale of these layers. Calibration gives layers with
the same input the same input_scale; if a layer has another one, the largest is written for each of the joined layers,
so that a consumer that does not join them computes the same.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes
from octavo.capture.tensors import Planned

from ...layers.install import all_names
from ...layers.modules import QuantizedLayer
from ...layers.schemes import FP8_DYNAMIC, FP8_STATIC
from ...layers.weights import check_finite_tensor
from ..diffusers.write import NONE, SHARD, config_of, write_config, write_weights
from ..linears import check_linears, float_parts, linear_tensors
from ..native import NativeModel, linears_in
from .models import consumers, vllm_scale_owner, written
from .rules import ALGO, ALGOS, IGNORE, METHOD, STATIC_WORD, TYPE, ignored, refusal


def write_modelopt(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    directory: Path,
    modes: Modes,
    *,
    parameters: Mapping[str, Callable[[], Tensor]] = NONE,
    shard: int = SHARD,
) -> None:
    """Writes config.json and the weights of `model`, with the FP8 `layers` in place of its float layers, into an
    existing directory. `modes` has the permissions of new files.

    `parameters` are the float parameters with smoothing factors folded in, a dict from name to a function that returns
    the new value. Weights of more than `shard` bytes are split into several files with an index. Raises UsageError for
    a model that no consumer computes in FP8 and for a layer that the format cannot hold, NumbersError for a number to
    be written that is not finite.
    """
    config, kind = config_of(model), type(model).__name__
    if reason := refusal(kind, config):
        raise UsageError(f"format modelopt: {reason}")
    scheme = _scheme_of(layers)
    named, linears, models = all_names(layers, model), linears_in(model), consumers(kind, scheme)
    codes = written(models, named, linears)
    scales = _input_scales(named, codes, models, linears) if scheme == FP8_STATIC else {}
    tensors = linear_tensors(layers, model, parameters, partial(_parts, codes, scales))
    tensors |= _under_own_names(kind, codes, tensors)
    quantization = {
        "quant_method": METHOD,
        ALGO: ALGOS[scheme],
        TYPE: STATIC_WORD,  # which diffusers asks for
        IGNORE: ignored(kind, scheme, linears, codes),
    }
    write_config(directory, config | {"quantization_config": quantization}, modes)
    write_weights(directory, tensors, {}, modes, shard)


def _scheme_of(layers: Mapping[str, QuantizedLayer]) -> str:
    """Returns the scheme that all layers have. Raises UsageError for layers of several schemes, and for a layer that
    the format cannot hold."""
    check_linears("modelopt", layers, ALGOS, "Use --element fp8 with --activations static or dynamic.")
    schemes = sorted({layer.scheme for layer in layers.values()})
    if len(schemes) > 1:
        raise UsageError(
            f"format modelopt: layers have the schemes {' and '.join(schemes)}. Calibrate with one of them."
        )
    scheme = schemes[0] if schemes else FP8_STATIC
    for name, layer in layers.items():
        if scheme == FP8_STATIC and not bool((layer.weight_scale == layer.weight_scale[0]).all()):
            fact = f"{name} has a scale for each output channel, and a static layer has one for its whole weight"
            raise UsageError(f"format modelopt: {fact}. Use --weight-scales tensor, or --activations dynamic.")
    return scheme


def _input_scales(
    layers: Mapping[str, QuantizedLayer], codes: set[str], models: tuple[NativeModel, ...], linears: list[str]
) -> dict[str, Tensor]:
    """Returns the input scale, float32 (1,), of each layer in `codes`, the names of the layers that are written in FP8:
    the largest of the layers that one of the consumers' `models` joins with it. `linears` are the names of all linear
    layers. Raises NumbersError for a scale that is not finite."""
    scales = {name: layers[name].input_scale.detach().to(torch.float32).view(1) for name in sorted(codes)}
    for name, scale in scales.items():
        check_finite_tensor(f"{name}.input_scale", scale)
    for model in models:
        for group in model.joined(linears).values():
            if codes.issuperset(group):
                largest = torch.stack([scales[name] for name in group]).amax(0)
                scales |= dict.fromkeys(group, largest)
    return scales


def _under_own_names(kind: str, codes: set[str], tensors: Mapping[str, Planned]) -> dict[str, Planned]:
    """Returns a dict from name to scale for the scales among `tensors` that vLLM-Omni finds only under its own name of
    their layer; the name in the dict is vLLM-Omni's. `codes` are the names in diffusers of the layers of the model
    class `kind` that are written in FP8."""
    owners = {name: own for name in sorted(codes) if (own := vllm_scale_owner(kind, name)) != name}
    return {
        f"{own}.{leaf}": tensors[f"{name}.{leaf}"]
        for name, own in owners.items()
        for leaf in ("weight_scale", "input_scale")
        if f"{name}.{leaf}" in tensors
    }


def _parts(
    codes: set[str], scales: Mapping[str, Tensor], name: str, layer: QuantizedLayer
) -> Iterator[tuple[str, Planned]]:
    if name not in codes:
        yield from float_parts(layer)
        return
    yield "weight", Planned.of(layer.weight.detach())
    weight_scale = layer.weight_scale.to(torch.float32)
    yield "weight_scale", Planned.of(weight_scale if layer.scheme == FP8_DYNAMIC else weight_scale[:1].clone())
    if name in scales:
        yield "input_scale", Planned.of(scales[name])
    if layer.bias is not None:
        yield "bias", Planned.of(layer.bias)
