"""Damaged checkpoints with timestep and dynamic layers are refused, and the message names the damage."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.inspect import check

from ....helpers.refusals import refused
from ....zoo.layer_kinds import TimedToy, changed, frozen, layers_of, written


def put(key: str, index: int, value: float) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[index] = value

    return change


def cut(key: str) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensors[key][:-1].clone()

    return change


def gone(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


TIMED = ("input_scale", "input_offset", "deq_scale", "quant_bias", "weight_scale", "weight")
DAMAGE = [
    *((gone(f"up.{key}"), f"up.{key} is missing") for key in TIMED),
    *((cut(f"up.{key}"), f"up.{key} is") for key in TIMED[:-1]),
    *((gone(f"down.linear.{key}"), f"down.linear.{key} is missing") for key in ("weight", "weight_scale")),
    (cut("down.div.mul_scale"), "down.div.mul_scale is"),
    (put("down.div.mul_scale", 2, 0.0), "down.div.mul_scale is not positive"),
    (put("down.div.mul_scale", 2, float("nan")), "down.div.mul_scale is not positive"),
    (put("down.linear.weight_scale", 1, -1.0), "down.weight_scale is not positive"),
    (put("down.linear.weight", 1, -128), "down.weight holds -128"),
    (put("up.input_scale", 4, 0.0), "up.input_scale is not positive"),
    (put("up.input_scale", 4, 9.0), "in the same bin of noise levels"),
    (put("up.deq_scale", 3, -1), "not the bits of a positive float32"),
    (put("up.deq_scale", 3, 0), "up.deq_scale is not positive"),
    (put("up.deq_scale", 3, 1 << 40), "not the bits of a positive float32"),
    (put("up.input_offset", 5, 0.5), "up.input_offset is 0.5"),
    (put("up.input_offset", 5, 128.0), "up.input_offset is 128.0"),
    (put("up.input_offset", 5, float("nan")), "up.input_offset is nan"),
    (put("up.quant_bias", 7, -(2**31)), "could overflow int32"),
    (put("up.quant_bias", 7, 5), "in the same bin of noise levels"),
]


@pytest.mark.parametrize(("change", "fact"), DAMAGE, ids=[f"{index}-{fact}" for index, (_, fact) in enumerate(DAMAGE)])
def test_what_no_export_writes_is_refused(change, fact, tmp_path):
    folder = sound(tmp_path)
    changed(folder, change)
    refused_read(folder, fact)


METADATA = [
    ("octavo.timesteps", "[]", "list no noise levels"),
    ("octavo.timesteps", "[1000, 800, 500, 499, 300]", "up.input_scale is"),
    ("octavo.timesteps", "[1000, 800, 500, 499, 300, 280]", "no row for timestep bin 0"),
    ("octavo.timesteps", '["now"]', "not a list of numbers"),
    ("octavo.timesteps", "[NaN]", "not a list of numbers"),
    ("octavo.timesteps", "[1" + "0" * 400 + "]", "not a list of numbers"),
    ("octavo.timesteps", "[true]", "not a list of numbers"),
    ("octavo.timesteps", "7", "not a list of numbers"),
    ("octavo.timesteps", "{", "not valid JSON"),
    ("octavo.edges", "{", "not valid JSON"),
    ("octavo.edges", "[]", "does not give increasing noise levels for up"),
    ("octavo.edges", "{}", "does not give increasing noise levels for up"),
    ("octavo.edges", '{"up": 5}', "does not give increasing noise levels for up"),
    ("octavo.edges", '{"up": [500, 250, 750]}', "does not give increasing noise levels for up"),
    ("octavo.edges", '{"up": [250, 500, 1e39]}', "does not give increasing noise levels for up"),
    ("octavo.edges", '{"up": [250, 500, 750, 760]}', "no row for timestep bin 3"),
    ("octavo.edges", '{"up": [250, 500]}', "in the same bin of noise levels"),
]


@pytest.mark.parametrize(("key", "value", "fact"), METADATA, ids=[f"{key}-{value[:30]}" for key, value, _ in METADATA])
def test_metadata_that_no_export_writes_are_refused(key, value, fact, tmp_path):
    folder = sound(tmp_path)
    changed(folder, lambda tensors: None, {key: value})
    refused_read(folder, fact)


def sound(folder: Path) -> Path:
    """Writes an undamaged checkpoint with a timestep layer and a dynamic layer, and returns its directory."""
    model = TimedToy()
    layers = layers_of(model, {"up": "W8A8_TIMESTEP"})
    layers["down"] = frozen(model.down, "W8A8_DYNAMIC", multiplier=torch.full((16,), 0.5))
    return written(folder / "out", model, layers)


def refused_read(folder: Path, fact: str) -> None:
    refused(lambda: load_ascend(folder), 3, fact)
    assert any(not verdict.ok for verdict in check(folder) if verdict.consumer == "octavo")
