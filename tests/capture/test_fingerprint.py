"""Checks that a fingerprint recognizes a model in another dtype, and no model with other values."""

import pytest
import torch

from octavo.capture.fingerprint import Origin

from ..zoo.toy import toy

HALVES = (torch.float16, torch.bfloat16)


def test_one_other_value_in_any_tensor_is_noticed():
    origin = Origin.of(toy())
    assert origin is not None
    for name in toy().state_dict():
        changed = toy()
        value = changed.state_dict()[name]
        value[(-1,) * value.ndim] += 1e-4 if value.is_floating_point() else 1
        assert origin.other_weights(changed) is not None, name
        assert origin.other_structure(changed) is None
    assert origin.other_weights(toy()) is None


@pytest.mark.parametrize("dtype", HALVES)
def test_the_same_weights_in_a_narrower_or_a_wider_dtype_are_the_same_model(dtype):
    wide, narrow = Origin.of(toy()), Origin.of(toy(dtype=dtype))
    assert wide is not None
    assert narrow is not None
    assert wide.other_weights(toy().to(dtype)) is None
    assert narrow.other_weights(toy(dtype=dtype).float()) is None
    assert wide.other_weights(toy(seed=1).to(dtype)) is not None
    assert narrow.other_weights(toy(seed=1)) is not None


def test_dtypes_that_do_not_hold_each_other_are_not_compared():
    origin = Origin.of(toy(dtype=torch.float16))
    assert origin is not None
    assert origin.other_weights(toy(dtype=torch.bfloat16, seed=1)) is None


def test_another_class_and_other_shapes_are_another_structure():
    origin = Origin.of(toy())
    assert origin is not None
    assert "tensors" in str(origin.other_structure(toy(width=32)))
    assert "Linear" in str(origin.other_structure(torch.nn.Linear(2, 2)))


def test_weights_on_the_meta_device_have_no_fingerprint():
    origin = Origin.of(toy())
    assert Origin.of(toy().to("meta")) is None
    assert origin is not None
    assert origin.other_weights(toy().to("meta")) is None
