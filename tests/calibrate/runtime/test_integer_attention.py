"""Attention in integers computes what a slow reference in torch computes, and declines what it cannot compute."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibrate.native import kernels
from octavo.calibrate.runtime.attention import CANDIDATES, DTYPES
from octavo.calibrate.runtime.operators import attended

TARGETS = list(kernels.targets())
KEYS, BLOCK, VALUE_LEVELS, WEIGHT_LEVELS = 512, 128, 1023, 16383  # as in native/attention.c
pytestmark = pytest.mark.skipif(not TARGETS, reason="no compiled kernels for this processor")


def integers(x, dim, levels):
    """Returns integers of at most `levels`, and their scale, from the largest magnitude along `dim`."""
    largest = x.abs().amax(dim, keepdim=True)
    # an int over a tensor would be rounded twice, and a value half-way between two integers could become the other one
    factor = torch.where(largest > 1e-30, torch.tensor(float(levels)) / largest, 0.0)
    return (x * factor).round().double(), torch.where(largest > 1e-30, largest / levels, 0.0).double()


def reference(q, k, v, mask=None, scale=None):
    """Computes attention from the same integers as the kernel, with sums and softmax in float64."""
    scale = (q.shape[-1] ** -0.5 if scale is None else scale) * math.log2(math.e)
    levels = min(32767, math.isqrt(2147483647 // q.shape[-1]))
    (q, q_scale), (k, k_scale) = (integers(x.float(), -1, levels) for x in (q, k))
    scores = q @ k.mT * (q_scale * scale) * k_scale.mT
    if mask is not None:
        bias = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else mask.float()
        scores = scores + bias.double() * math.log2(math.e)
    top = scores.amax(-1, keepdim=True).clamp_min(-1e300)
    y, total = 0.0, 0.0
    for start in range(0, scores.shape[-1], KEYS):
        piece = scores[..., start : start + KEYS]
        largest = piece.amax(-1, keepdim=True).clamp_min(-1e300)
        weights = (WEIGHT_LEVELS * (piece - largest).exp2()).round() * (largest - top).exp2()
        total = total + weights.sum(-1, keepdim=True)
        for some, part in zip(v[..., start : start + KEYS, :].split(BLOCK, -2), weights.split(BLOCK, -1), strict=True):
            codes, v_scale = integers(some.float(), -2, VALUE_LEVELS)
            y = y + part @ codes * v_scale
    return y / total.masked_fill(total == 0, 1.0), scores


def mask_of(kind, rows, keys, dtype):
    if kind == "none":
        return None
    if kind == "bool":
        mask = torch.rand(rows, keys) > 0.5
        mask[rows // 2] = False
        return mask
    if kind == "one key":
        return torch.arange(keys).expand(rows, keys) == keys - 1
    return (3 * torch.randn(rows, keys)).to(dtype)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(TARGETS),
    st.sampled_from(DTYPES),
    st.sampled_from([(2,), (1, 3), (2, 1, 2)]),
    st.tuples(st.sampled_from([1, 5, 48, 77, 130]), st.sampled_from([1, 2, 33, 127, 128, 300, 512, 513, 1100])),
    st.tuples(st.sampled_from([1, 7, 40, 64, 72, 128, 256]), st.sampled_from([1, 8, 40, 65, 256])),
    st.sampled_from([1e-6, 0.01, 1.0, 5.0, 100.0]),
    st.sampled_from(["none", "bool", "one key", "float"]),
    st.sampled_from([None, 0.3, -0.1, 0.0]),
    st.sampled_from(["plain", "channels", "tokens", "zeros"]),
    st.integers(0, 2**31),
)
def test_any_input_gives_the_numbers_of_the_reference(
    target, dtype, heads, lengths, widths, size, kind, scale, outliers, seed
):
    torch.manual_seed(seed)
    (rows, keys), (width, out) = lengths, widths
    q, k, v = (torch.randn(*heads, n, w) for n, w in ((rows, width), (keys, width), (keys, out)))
    if outliers == "channels":
        q[..., 0] *= 30
        k[..., 0] *= 30
        v[..., 0] *= 100
    elif outliers == "tokens":
        q[..., 0, :] *= 30
        k[..., -1, :] *= 30
        v[..., 0, :] *= 100
    elif outliers == "zeros":
        q[..., 0, :], k[..., 0, :], v[..., 0] = 0, 0, 0
    q, k, v = ((x * factor).to(dtype) for x, factor in ((q, size), (k, 1.0), (v, 1.0)))
    mask = mask_of(kind, rows, keys, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda: kernels.targets()[target])
        y = CANDIDATES["integers"].run(q, k, v, mask, scale)
    wanted, scores = reference(q, k, v, mask, scale)
    assert (y.dtype, y.shape) == (dtype, wanted.shape)
    largest = scores.masked_fill(scores.isinf(), 0.0).abs().amax()
    # scores are rounded to float32 a few times, weights differ by a level in the few cases that are close to a half
    allowed = v.double().abs().amax() * (2.0**-11 + 8 * 2.0**-24 * largest + (0 if dtype == torch.float32 else 2.0**-8))
    assert (y.double() - wanted).abs().max() <= allowed


def relative_error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("outliers", ["none", "queries", "both", "tokens"])
@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 10.0])
def test_the_error_is_below_that_of_bfloat16(size, outliers):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 700, 64) for _ in range(3))
    if outliers in ("queries", "both"):
        q[..., 7] *= 30
    if outliers == "both":
        k[..., 7] *= 30
    if outliers == "tokens":
        q[..., 5, :], k[..., 9, :] = 30 * q[..., 5, :], 30 * k[..., 9, :]
    q *= size
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    bfloat16 = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert relative_error(CANDIDATES["integers"].run(q, k, v), exact) < relative_error(bfloat16, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value", "mask"])
@pytest.mark.parametrize("number", [math.nan, math.inf, 1e30])
def test_numbers_out_of_range_are_left_to_another_candidate(dtype, where, number):
    torch.manual_seed(0)
    inputs = {name: torch.randn(1, 2, 64, 40).to(dtype) for name in ("query", "key", "value")}
    inputs["mask"] = torch.zeros(64, 64).to(dtype)
    inputs[where][..., 3, 5] = number
    query, key, value, mask = inputs.values()
    if where != "mask" or not mask.isfinite().all():
        assert CANDIDATES["integers"].run(query, key, value, mask) is None
    outputs = (attended(query, key, value, mask, word=word) for word in ("integers", "float"))
    assert torch.equal(*(y.isnan() for y in outputs))


def test_no_gradient_and_no_graph_is_needed_to_call_it_from_torch():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 64, 40) for _ in range(3))
    compiled = torch.compile(lambda *x: attended(*x, word="integers"), backend="eager")
    assert torch.equal(compiled(query, key, value), attended(query, key, value, word="integers"))
