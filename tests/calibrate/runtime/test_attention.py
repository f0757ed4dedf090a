"""Every candidate for attention on a CPU that computes in floating point gives what torch does in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibrate.runtime.attention import ATTENTION, CANDIDATES, DTYPES

EPS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# the candidates that this machine can run, each with a dtype; torch's own attention is what they are compared with
FITTING = [(name, dtype) for name in ATTENTION["float"] for dtype in DTYPES if CANDIDATES[name].fits(dtype)]
FITTING = [pair for pair in FITTING if pair[0] != "torch"]
MASKS = ("none", "bool", "keys", "float", "lowest")


def exact(q, k, v, mask=None, scale=None):
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, scale=scale)


def mask_of(kind, rows, keys, dtype):
    if kind == "bool":
        return torch.rand(rows, keys) > 0.5
    if kind == "keys":
        return torch.rand(1, 1, keys) > 0.3
    if kind == "float":
        return torch.randn(rows, keys).to(dtype)
    return torch.where(torch.rand(rows, keys) > 0.5, 0.0, torch.finfo(dtype).min).to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(FITTING),
    st.sampled_from([(2,), (1, 3), (2, 1, 2)]),
    st.tuples(st.sampled_from([1, 17, 130]), st.sampled_from([1, 2, 77, 200])),
    st.tuples(st.sampled_from([1, 7, 40, 64, 128]), st.sampled_from([1, 8, 65])),
    st.sampled_from([0.01, 1.0, 5.0, 30.0]),
    st.sampled_from(MASKS),
    st.sampled_from([None, 0.3, -0.1, 0.0]),
    st.integers(0, 2**31),
)
def test_any_shape_scale_and_mask(candidate, heads, lengths, widths, size, kind, scale, seed):
    attention, dtype = CANDIDATES[candidate[0]].run, candidate[1]
    torch.manual_seed(seed)
    (rows, keys), (width, out) = lengths, widths
    q = (size * torch.randn(*heads, rows, width)).to(dtype)
    k, v = torch.randn(*heads, keys, width).to(dtype), torch.randn(*heads, keys, out).to(dtype)
    mask = None if kind == "none" else mask_of(kind, rows, keys, dtype)
    y, wanted = attention(q, k, v, mask, scale=scale), exact(q, k, v, mask, scale)
    assert (y.dtype, y.shape) == (dtype, wanted.shape)
    # a score is off by roundings of what it is a sum of, and then so are the weights
    factor = width**-0.5 if scale is None else abs(scale)
    terms = factor * (q.double().abs() @ k.double().abs().mT).amax() + (0 if kind != "float" else 4)
    allowed = EPS[dtype] * (4 + (terms if dtype != torch.float16 else 1)) * v.double().abs().amax()
    assert (y.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize(("name", "dtype"), FITTING, ids=str)
@pytest.mark.parametrize("size", [0.3, 1.0, 3.0, 10.0])
def test_attention_is_about_as_exact_as_torch(name, dtype, size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 300, 2, 64).to(dtype).transpose(1, 2) for _ in range(3))
    q = q * size
    wanted = exact(q, k, v)
    outputs = CANDIDATES[name].run(q, k, v), F.scaled_dot_product_attention(q, k, v)
    ours, torchs = ((y.double() - wanted).norm() for y in outputs)
    assert ours < 1.5 * torchs + 1e-6 * wanted.norm()


@pytest.mark.parametrize("name", [name for name, dtype in FITTING if dtype == torch.bfloat16])
@pytest.mark.parametrize("keys", [300, 1357])
@pytest.mark.parametrize("size", [0.0, 0.3, 3.0, 30.0])
def test_a_value_that_all_keys_share_is_the_output(name, size, keys):
    torch.manual_seed(0)
    q, k = size * torch.randn(1, 2, 300, 64).bfloat16(), torch.randn(1, 2, keys, 64).bfloat16()
    v = torch.tensor([1.0, -1.5, 0.0]).bfloat16().expand(1, 2, keys, 3)
    assert torch.allclose(CANDIDATES[name].run(q, k, v), v[:, :, :1], rtol=2**-7, atol=0)


@pytest.mark.parametrize(("name", "dtype"), [pair for pair in FITTING if pair[1] != torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 15.0, 25.0, 40.0, 1e4])
def test_scores_of_any_size_are_finite_and_right(name, dtype, size):
    """Vectors along one line, so that scores reach their bounds; half of the rows point away from all keys."""
    torch.manual_seed(0)
    line = F.normalize(torch.randn(64), dim=0)
    q = (torch.tensor([1.0, -1.0]).repeat(150)[:, None] * line * size).to(dtype)[None]
    k = ((1 + torch.rand(300, 1)) * line * 8).to(dtype)[None]
    v = torch.randn(1, 300, 16).to(dtype)
    y, wanted = CANDIDATES[name].run(q, k, v), exact(q, k, v)
    terms = float((q.double().abs() @ k.double().abs().mT).amax() / 8)
    assert y.isfinite().all()
    assert (y.double() - wanted).abs().max() <= EPS[dtype] * (4 + terms) * v.abs().max()
    if size == 1e4:
        assert (y.double() - wanted).norm() < 4 * EPS[dtype] * wanted.norm() + 1e-3 * wanted.norm()


@pytest.mark.parametrize(("name", "dtype"), FITTING, ids=str)
def test_rows_whose_keys_are_all_masked_are_zeros_as_in_torch(name, dtype):
    q, k, v = (torch.randn(1, 2, 300, 8).to(dtype) for _ in range(3))
    mask = torch.rand(300, 300) > 0.5
    mask[7] = False
    y = CANDIDATES[name].run(q, k, v, mask)
    assert torch.equal(y[:, :, 7], torch.zeros(1, 2, 8).to(dtype))
    assert torch.allclose(y.double(), exact(q, k, v, mask), atol=8 * EPS[dtype])


def test_long_sequences_in_pieces_give_the_same_output():
    attention = CANDIDATES["oneDNN products"].run
    q, k, v = (torch.randn(1, 1, 5000, 8) for _ in range(3))
    q, whole = q[:, :, :2000], attention(q[:, :, :2000], k, v)
    assert torch.allclose(whole, torch.cat([attention(some, k, v) for some in q.split(300, 2)], 2), atol=1e-6)
    assert torch.allclose(whole, exact(q, k, v).float(), atol=1e-5)


def test_each_word_allows_candidates_and_where_several_the_first_is_torchs_own():
    for names in ATTENTION.values():
        assert names[0] == "torch" or len(names) == 1
        assert set(names) <= set(CANDIDATES)
