"""Matrix products and convolutions of integers are summed exactly."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibrate.layers.products import integer_convolution, integer_matmul

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def whole(q, weight, stride, dilation, groups):
    """Returns the convolution in int64, computed from patches."""
    patches = q.long()
    for axis, (size, step, apart) in enumerate(zip(weight.shape[2:], stride, dilation, strict=True), 2):
        patches = patches.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
    patches = patches.unflatten(1, (groups, -1))  # (batch, groups, in, out height, out width, height, width)
    kernels = weight.long().unflatten(0, (groups, -1))
    return torch.einsum("bgihwyx,goiyx->bgohw", patches, kernels).flatten(1, 2)


@settings(max_examples=60, deadline=None)
@given(pairs, pairs, pairs, st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_convolutions_are_those_of_int64(size, stride, dilation, groups, channels, seed, largest):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (2, groups * channels, 9, 10), generator=generator)
    weight = torch.randint(-127, 128, (groups * 3, channels, *size), generator=generator)
    if largest:
        q, weight = torch.full_like(q, -128), torch.full_like(weight, 127)
    output = integer_convolution(q.float(), weight.to(torch.int8), stride, dilation, groups)
    assert output.dtype == torch.int32
    assert torch.equal(output.long(), whole(q, weight, stride, dilation, groups))


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(
    ("channels", "size", "groups"),
    [(2500, 1, 1), (300, 3, 1), (300, 3, 2), (1, 3, 64), (3, 31, 1), (2, 33, 1), (16, 3, 1)],
    ids=["1x1", "3x3", "groups", "depthwise", "one channel a piece", "a kernel above a piece", "small"],
)
def test_the_largest_possible_sums_are_exact(channels, size, groups, batch):
    q = torch.full((batch, channels * groups, 34, 34), -128.0)
    weight = torch.full((groups, channels, size, size), 127, dtype=torch.int8)
    output = integer_convolution(q, weight, (2, 2), (1, 1), groups)
    assert bool((output == -128 * 127 * channels * size**2).all())


def test_an_empty_batch_gives_an_empty_output():
    output = integer_convolution(torch.empty(0, 4, 8, 8), torch.ones(6, 4, 3, 3, dtype=torch.int8), (1, 1), (1, 1), 1)
    assert output.shape == (0, 6, 6, 6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2100), st.integers(1, 5), st.integers(0, 2**31))
def test_products_of_matrices_are_those_of_int64(columns, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (3, columns), generator=generator)
    weight = torch.randint(-127, 128, (outputs, columns), generator=generator)
    assert torch.equal(integer_matmul(q.float(), weight.to(torch.int8)).long(), F.linear(q, weight))
