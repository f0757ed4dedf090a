"""Octavo's attention on a CPU is that of float64, and is heard of only inside forwards of the model it was given to."""

import copy
import io
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from octavo.calibrate.runtime import accelerate
from octavo.calibrate.runtime import attention as home
from octavo.calibrate.runtime.attention import Attention, attend, attention, is_faster, is_quick
from octavo.capture.recorder import Memory, Recorder, copied

from ...pipelines.test_families import OF, denoiser, run
from .test_compiled import compiled, transformer

pytestmark = pytest.mark.skipif(not is_quick(), reason="this CPU has torch's attention")
EPS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
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
    st.sampled_from(list(EPS)),
    st.sampled_from([(2,), (1, 3), (2, 1, 2)]),
    st.tuples(st.sampled_from([1, 17, 130]), st.sampled_from([1, 2, 77, 200])),
    st.tuples(st.sampled_from([1, 7, 40, 64, 128]), st.sampled_from([1, 8, 65])),
    st.sampled_from([0.01, 1.0, 5.0, 30.0]),
    st.sampled_from(MASKS),
    st.sampled_from([None, 0.3, -0.1, 0.0]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape_scale_and_mask(dtype, heads, lengths, widths, size, kind, scale, compiled, seed):
    torch.manual_seed(seed)
    (rows, keys), (width, out) = lengths, widths
    q = (size * torch.randn(*heads, rows, width)).to(dtype)
    k, v = torch.randn(*heads, keys, width).to(dtype), torch.randn(*heads, keys, out).to(dtype)
    mask = None if kind == "none" else mask_of(kind, rows, keys, dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(home.kernels, "library", lambda: None)
        y, wanted = attention(q, k, v, mask, scale=scale), exact(q, k, v, mask, scale)
    assert (y.dtype, y.shape) == (dtype, wanted.shape)
    # a score is off by roundings of what it is a sum of, and then so are the weights
    factor = width**-0.5 if scale is None else abs(scale)
    terms = factor * (q.double().abs() @ k.double().abs().mT).amax() + (0 if kind != "float" else 4)
    allowed = EPS[dtype] * (4 + (terms if dtype != torch.float16 else 1)) * v.double().abs().amax()
    assert (y.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("size", [0.3, 1.0, 3.0, 10.0])
def test_it_is_about_as_exact_as_torch(dtype, size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 300, 2, 64).to(dtype).transpose(1, 2) for _ in range(3))
    q = q * size
    wanted = exact(q, k, v)
    ours, torchs = ((y.double() - wanted).norm() for y in (attention(q, k, v), F.scaled_dot_product_attention(q, k, v)))
    assert ours < 1.5 * torchs + 1e-6 * wanted.norm()


@pytest.mark.parametrize("keys", [300, 1357])
@pytest.mark.parametrize("size", [0.0, 0.3, 3.0, 30.0])
def test_what_all_keys_hold_comes_out(size, keys):
    torch.manual_seed(0)
    q, k = size * torch.randn(1, 2, 300, 64).bfloat16(), torch.randn(1, 2, keys, 64).bfloat16()
    v = torch.tensor([1.0, -1.5, 0.0]).bfloat16().expand(1, 2, keys, 3)
    assert torch.allclose(attention(q, k, v), v[:, :, :1], rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 15.0, 25.0, 40.0, 1e4])
def test_scores_of_any_size_are_finite_and_right(dtype, size):
    """Vectors along one line, so that scores reach their bounds; half of the rows point away from all keys."""
    torch.manual_seed(0)
    line = F.normalize(torch.randn(64), dim=0)
    q = (torch.tensor([1.0, -1.0]).repeat(150)[:, None] * line * size).to(dtype)[None]
    k = ((1 + torch.rand(300, 1)) * line * 8).to(dtype)[None]
    v = torch.randn(1, 300, 16).to(dtype)
    y, wanted = attention(q, k, v), exact(q, k, v)
    terms = float((q.double().abs() @ k.double().abs().mT).amax() / 8)
    assert y.isfinite().all()
    assert (y.double() - wanted).abs().max() <= EPS[dtype] * (4 + terms) * v.abs().max()
    if size == 1e4:
        assert (y.double() - wanted).norm() < 4 * EPS[dtype] * wanted.norm() + 1e-3 * wanted.norm()


def test_rows_that_may_look_at_nothing_are_zeros_as_torchs_are():
    q, k, v = (torch.randn(1, 2, 300, 8) for _ in range(3))
    mask = torch.rand(300, 300) > 0.5
    mask[7] = False
    y = attention(q, k, v, mask)
    assert torch.equal(y[:, :, 7], torch.zeros(1, 2, 8))
    assert torch.allclose(y, F.scaled_dot_product_attention(q, k, v, mask), atol=1e-6)


def test_long_sequences_in_pieces_are_what_they_are_at_once():
    q, k, v = (torch.randn(1, 1, 5000, 8) for _ in range(3))
    q, whole = q[:, :, :2000], attention(q[:, :, :2000], k, v)
    assert torch.allclose(whole, torch.cat([attention(some, k, v) for some in q.split(300, 2)], 2), atol=1e-6)
    assert torch.allclose(whole, exact(q, k, v).float(), atol=1e-5)


Q = torch.randn(1, 4, 300, 8)
NOT_OURS = {
    "dropout": ((Q, Q, Q), {"dropout_p": 0.1}),
    "causal": ((Q, Q, Q), {"is_causal": True}),
    "groups": ((Q, Q[:, :2], Q[:, :2]), {"enable_gqa": True}),
    "spread heads": ((Q, Q[:, :1], Q[:, :1]), {}),
    "float64": ((Q.double(), Q.double(), Q.double()), {}),
    "gradient": ((Q.clone().requires_grad_(), Q, Q), {}),
    "few": ((Q[:, :, :5], Q[:, :, :5], Q[:, :, :5]), {}),
    "none": ((Q[:, :, :0], Q, Q), {}),
    "no keys": ((Q, Q[:, :, :0], Q[:, :, :0]), {}),
    "matrices": ((Q[0, 0], Q[0, 0], Q[0, 0]), {}),
    "mask that is trained": ((Q, Q, Q), {"attn_mask": torch.zeros(300, 300, requires_grad=True)}),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_not_ours_is_torchs_to_the_bit(name):
    args, options = NOT_OURS[name]
    torch.manual_seed(0)
    wanted = F.scaled_dot_product_attention(*args, **options)
    torch.manual_seed(0)
    assert not is_faster(*args, **options)
    with Attention():
        y = F.scaled_dot_product_attention(*args, **options)
    assert torch.equal(y, wanted)
    assert y.requires_grad == wanted.requires_grad


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_not_ours_is_torchs_in_a_graph_too(name):
    args, options = NOT_OURS[name]
    function = compiled(lambda: F.scaled_dot_product_attention(*args, **options), "eager")
    torch.manual_seed(0)
    wanted = F.scaled_dot_product_attention(*args, **options)
    torch.manual_seed(0)
    with Attention():
        y = function()
    torch.testing.assert_close(y, wanted)
    assert y.requires_grad == wanted.requires_grad


def test_what_torch_refuses_is_refused():
    with Attention(), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(Q, Q, Q, torch.zeros(3, 300))
    with Attention(), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(Q, Q.bfloat16(), Q)


def test_autocast_is_torchs():
    with torch.autocast("cpu", torch.bfloat16), Attention():
        assert F.scaled_dot_product_attention(Q, Q, Q).dtype == torch.bfloat16


class Model(nn.Module):
    """Attention to itself; tells whose it was."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.inside: list[bool] = []

    def forward(self, x, fail=None):
        self.inside.append(isinstance(torch.overrides._get_current_function_mode(), Attention))
        if fail:
            raise fail
        return F.scaled_dot_product_attention(self.to_q(x), x, x)


def outside():
    return torch.overrides._get_current_function_mode() is None


@torch.no_grad()
def test_it_lasts_as_long_as_a_forward_and_comes_with_a_copy():
    model, x = Model(), Q[0]
    wanted = model(x)
    accelerate(model)
    accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for each in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        y = each(x)
        assert each.inside[-1]
        assert outside()
        assert torch.allclose(y, wanted, atol=1e-6)
    for options in ({"backend": "reference"}, {"attention": False}):
        accelerate(model)
        accelerate(model, **options)
        assert torch.equal(model(x), wanted)
        assert not model.inside[-1]
        assert not model._forward_hooks
        assert not model._forward_pre_hooks


def test_a_forward_that_fails_leaves_nothing_behind():
    model = Model()
    attend(model, True)
    with pytest.raises(ValueError, match="no"):
        model(Q[0], ValueError("no"))
    assert outside()
    with pytest.raises(KeyboardInterrupt):
        model(Q[0], KeyboardInterrupt())
    with torch.no_grad():
        model(Q[0])
    assert outside()
    model.register_forward_pre_hook(lambda *_: math.sqrt(-1), prepend=True)
    with pytest.raises(ValueError, match="math"):
        model(Q[0])
    assert outside()


def test_other_threads_do_not_hear_of_it():
    found = []

    class Asks(Model):
        def forward(self, x):
            thread = threading.Thread(target=lambda: found.append(outside()))
            thread.start()
            thread.join()
            return super().forward(x)

    model = Asks()
    attend(model, True)
    model(Q[0])
    assert found == [True]
    assert model.inside == [True]


@torch.no_grad()
def test_a_transformer_puts_out_what_it_did():
    model = transformer("W8A16", size=64)
    inputs = torch.randn(1, 16, 64, 64), torch.randn(1, 70, 16), torch.randn(1, 8), torch.tensor([500.0])
    y = model(*inputs)[0]
    attend(model, False)
    wanted = model(*inputs)[0]
    assert not torch.equal(y, wanted)
    assert torch.allclose(y, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", OF)
def test_denoisers_of_all_families_put_out_what_they_did(name, monkeypatch):
    pipe, arguments, module = denoiser(name)
    memory, taken = Memory(), []
    with Recorder(module, memory):
        run(pipe, arguments)
    call = memory.calls[0]

    def output():
        return module(*copied(call.args), **copied(call.kwargs) | {"return_dict": False})[0]

    wanted = output()
    monkeypatch.setattr(home, "_LEAST_SCORES", 0)
    monkeypatch.setattr(home, "attention", lambda *args, **options: taken.append(1) or attention(*args, **options))
    attend(module, True)
    y = output()
    assert taken
    assert torch.allclose(y, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
