"""A transform of the input and its inverse in the weight cancel, for every type of transform."""

import pytest
import torch
from torch import nn

from octavo.calibrate.choice import Choice, layer_of
from octavo.calibrate.layers import transforms
from octavo.calibrate.layers.inputs import DynamicInput
from octavo.calibrate.layers.schemes import ROTATIONS
from octavo.calibrate.layers.transforms import (
    TRANSFORMS,
    Multiply,
    MultiplyRotate,
    Rotate,
    same_transform,
    without_multiplier,
)

COLUMNS = 128
MULTIPLY, ROTATE = Multiply(torch.linspace(0.5, 1.5, COLUMNS)), Rotate.by(64)
EXAMPLES = {Multiply: MULTIPLY, Rotate: ROTATE, MultiplyRotate: MultiplyRotate(MULTIPLY, ROTATE)}
every = pytest.mark.parametrize("kind", TRANSFORMS)


@every
def test_the_weight_undoes_what_happens_to_the_input(kind):
    transform, weight, x = EXAMPLES[kind], torch.randn(8, COLUMNS), torch.randn(3, 5, COLUMNS)
    assert transform.fault() is None
    product, size = transform.input(x) @ transform.weight(weight).T, x.norm() * weight.norm()
    torch.testing.assert_close(product, x @ weight.T, rtol=0, atol=float(size) * 1e-6)  # float32 rounds each product


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


@pytest.mark.parametrize("size", ROTATIONS)
def test_a_rotation_keeps_lengths_and_is_its_own_inverse(size):
    rotate, x = Rotate.by(size), torch.randn(5, 7, 2 * size, dtype=torch.float64)
    y = rotate.input(x)
    assert rotate.size == size
    torch.testing.assert_close(rotate.input(y), x)
    torch.testing.assert_close(y.unflatten(-1, (2, size)).norm(dim=-1), x.unflatten(-1, (2, size)).norm(dim=-1))
    torch.testing.assert_close(rotate.input(x.mT, -2), y.mT)


@pytest.mark.parametrize("size", ROTATIONS)
def test_a_rotation_spreads_one_channel_evenly_over_its_group(size):
    x = torch.zeros(2 * size)
    x[3] = 1.0
    y = Rotate.by(size).input(x)
    torch.testing.assert_close(y.abs(), torch.cat([torch.full((size,), size**-0.5), torch.zeros(size)]))


def test_the_matrix_of_four_channels_is_that_of_convrot():
    expected = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    torch.testing.assert_close(Rotate.by(16).input(torch.eye(16)), torch.kron(expected, expected))


def test_a_folded_multiplier_leaves_the_rotation():
    assert without_multiplier(EXAMPLES[MultiplyRotate]) is ROTATE
    assert without_multiplier(MULTIPLY) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", ROTATIONS)
def test_a_rotation_is_the_product_with_a_matrix_with_and_without_the_kernel(monkeypatch, size, dtype):
    matrix, h4 = torch.ones(1, 1), (torch.ones(4, 4) - 2 * torch.eye(4).flip(1)) / 2
    while len(matrix) < size:
        matrix = torch.kron(matrix, h4)
    rotate, x = Rotate.by(size), torch.randn(3, 5, 3 * size).to(dtype)
    exact = (x.double().unflatten(-1, (-1, size)) @ matrix.double()).flatten(-2)
    fast = rotate.input(x)
    torch.testing.assert_close(fast, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(rotate.input(x.movedim(-1, 1), -2), fast.movedim(-1, 1), rtol=0, atol=0)
    monkeypatch.setattr(transforms, "kernels_for", lambda x: None)
    torch.testing.assert_close(rotate.input(x), fast, rtol=0, atol=0)
