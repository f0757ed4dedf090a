"""Writes the format `diffusers`: a directory that `from_pretrained` of the model's class loads after `import octavo`.

config.json is the float model's config.json plus a quantization_config (see `structure`). Weight files and tensors have
diffusers' names. An integer layer X has the tensors of its state_dict: X.weight in int8, X.weight_scale, X.input_scale,
X.deq, X.quant_bias and so on, exactly those with which calibration measured the accuracy. Other tensors are those of
the float model, changed only where smoothing factors were folded into them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes, create
from octavo.capture.paging import page_out
from octavo.capture.tensors import Planned, write_tensors

from ...layers.install import all_names
from ...layers.modules import QuantizedLayer
from ...layers.weights import check_finite_tensor
from .directory import CONFIG_FILE, INDEX_FILE, WEIGHT_PATTERN
from .layers import structure_of

NONE: Mapping[str, Callable[[], Tensor]] = {}  # for `parameters`: no float parameter has a new value
SHARD = 10 * 10**9  # bytes; the largest weight file, as in diffusers' own default of 10GB


def write_diffusers(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    directory: Path,
    modes: Modes,
    *,
    parameters: Mapping[str, Callable[[], Tensor]] = NONE,
    shard: int = SHARD,
) -> None:
    """Writes config.json and the weights of `model`, with the integer `layers` in place of its float layers, into an
    existing directory. `modes` has the permissions of new files.

    `model` may be the float model, or a model that has the integer layers already. Weights of more than `shard` bytes
    are split into several files with an index. `parameters` are the float parameters with smoothing factors folded in,
    a dict from name to a function that returns the new value. W8A8_TIMESTEP layers are written with their timestep bins
    (intervals of noise levels), and serve any number of denoising steps.

    Raises UsageError for a model that is not a diffusers model, NumbersError for a number to be written that is not
    finite.
    """
    config = config_of(model)
    named = all_names(layers, model)
    write_config(directory, config | {"quantization_config": structure_of(named).as_dict()}, modes)
    write_weights(directory, dict(state(model, named, parameters)), {}, modes, shard)


def config_of(model: nn.Module) -> dict[str, Any]:
    """Returns the config of a diffusers model as save_pretrained writes it, without quantization_config and without the
    path that the model was loaded from. Raises UsageError for a model that is not a diffusers model."""
    if not callable(getattr(model, "to_json_string", None)):
        fact = f"{type(model).__name__} is not a diffusers model, so there is no config.json to write"
        raise UsageError(f"format diffusers: {fact}. Use --format ascend.")
    config: dict[str, Any] = json.loads(model.to_json_string())  # type: ignore[operator]
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    return config


def state(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], parameters: Mapping[str, Callable[[], Tensor]]
) -> Iterator[tuple[str, Planned]]:
    """Yields the name and the value of each tensor to be written for `model` with the integer `layers` in place of its
    float layers, in the order of the model's state_dict.

    `parameters` are the float parameters with smoothing factors folded in, a dict from name to a function that returns
    the new value. Tensors that are mapped from a file, and new values, take no memory until they are written. Raises
    NumbersError for a number that is not finite.
    """
    written: set[str] = set()
    for name, tensor in model.state_dict().items():
        owner = name.rpartition(".")[0]
        if owner not in layers:
            make = parameters.get(name, partial(_same, tensor))
            check_finite_tensor(name, make())
            page_out(tensor)
            yield name, Planned(tensor.dtype, tuple(tensor.shape), make)
        elif owner not in written:
            written.add(owner)
            for key, value in layers[owner].state_dict().items():
                check_finite_tensor(f"{owner}.{key}", value)
                page_out(value)
                yield f"{owner}.{key}", Planned.of(value)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def write_config(directory: Path, config: Mapping[str, Any], modes: Modes) -> None:
    """Writes `config` to config.json in `directory`, formatted as diffusers does: sorted keys, indented by two. `modes`
    has the permissions of new files."""
    with create(directory / CONFIG_FILE, modes.data) as sink:
        sink.write((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def write_weights(
    directory: Path, tensors: dict[str, Planned], metadata: Mapping[str, str], modes: Modes, shard: int
) -> None:
    """Writes `tensors`, a dict by name, to weight files with `metadata` in their headers: one file, or several of at
    most `shard` bytes each and an index, split as diffusers splits them. `modes` has the permissions of new files."""
    split = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda planned: planned.bytes, filename_pattern=WEIGHT_PATTERN, max_shard_size=shard
    )
    for name, keys in split.filename_to_tensors.items():
        write_tensors(directory / name, {key: tensors[key] for key in keys}, metadata, modes.data)
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
        with create(directory / INDEX_FILE, modes.data) as sink:
            sink.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
