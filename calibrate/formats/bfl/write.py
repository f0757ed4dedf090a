"""Writes the format `bfl`: a model directory whose weight file has the layout `fp8r` of Black Forest Labs. The rules
are in the module `rules`."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from octavo.capture.files import Modes
from octavo.capture.tensors import Planned

from ...layers.modules import QuantizedLayer
from ...layers.schemes import FP8_DYNAMIC
from ..diffusers.write import NONE, SHARD, config_of, write_config, write_weights
from ..linears import check_linears, linear_tensors
from .rules import METHOD


def write_bfl(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    directory: Path,
    modes: Modes,
    *,
    parameters: Mapping[str, Callable[[], Tensor]] = NONE,
    shard: int = SHARD,
) -> None:
    """Writes config.json and the weights of `model`, in one file, with the FP8 `layers` in place of its float layers,
    into an existing directory. `modes` has the permissions of new files.

    `parameters` are the float parameters with smoothing factors folded in, a dict from name to a function that returns
    the new value. `shard`, the largest size of a file in other formats, is not used: `from_single_file` reads one file.
    Raises UsageError for a layer that the format cannot hold and for a model that is not a diffusers
    model, NumbersError for a number to be written that is not finite.
    """
    config = config_of(model)
    check_linears("bfl", layers, (FP8_DYNAMIC,), "Use --element fp8 --activations dynamic.")
    tensors = linear_tensors(layers, model, parameters, _parts)
    # diffusers' from_pretrained ends with an error for this config; without it, it would take the codes for weights
    write_config(directory, config | {"quantization_config": {"quant_method": METHOD}}, modes)
    write_weights(directory, tensors, {"format": "pt"}, modes, sys.maxsize)


def _parts(name: str, layer: QuantizedLayer) -> Iterator[tuple[str, Planned]]:
    yield "weight", Planned.of(layer.weight.detach())
    yield "weight_scale", Planned.of(layer.weight_scale.view(-1))
    if layer.bias is not None:
        yield "bias", Planned.of(layer.bias.detach())
