"""A transform of the input and its inverse in the weight cancel, for every type of transform."""

import pytest
import torch
from torch import nn

from octavo.calibrate.choice import Choice, layer_of
from octavo.calibrate.layers.inputs import DynamicInput
from octavo.calibrate.layers.transforms import TRANSFORMS, Multiply, same_transform

COLUMNS = 24
EXAMPLES = {Multiply: Multiply(torch.rand(COLUMNS) + 0.5)}
every = pytest.mark.parametrize("kind", TRANSFORMS)


@every
def test_the_weight_undoes_what_happens_to_the_input(kind):
    transform, weight, x = EXAMPLES[kind], torch.randn(8, COLUMNS), torch.randn(3, 5, COLUMNS)
    assert transform.fault() is None
    torch.testing.assert_close(transform.input(x) @ transform.weight(weight).T, x @ weight.T)


@every
def test_a_transform_by_channel_keeps_the_order_of_each_channel(kind):
    low, high = torch.randn(2, COLUMNS).sort(0).values
    assert not kind.by_channel or bool((EXAMPLES[kind].input(low) <= EXAMPLES[kind].input(high)).all())


@every
def test_a_layer_holds_its_transform_and_gives_it_back(kind):
    transform, module, x = EXAMPLES[kind], nn.Linear(COLUMNS, 8).requires_grad_(False), torch.randn(3, COLUMNS)
    layer = layer_of(module, Choice(DynamicInput(), transform))
    assert not isinstance(layer, str)
    assert same_transform(layer.transform, transform)
    assert set(kind.TENSORS) <= set(layer.state_dict())
    assert float((layer(x) - module(x)).square().sum() / module(x).square().sum()) < 1e-3
