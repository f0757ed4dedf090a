"""The chosen float operators compute what torch does, only inside forwards of the model they were chosen for."""

import copy
import io
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo.calibrate.runtime import accelerate, attend, operators
from octavo.calibrate.runtime.attention import ATTENTION, CANDIDATES
from octavo.calibrate.runtime.operators import FastOperators, attended
from octavo.capture.recorder import Memory, Recorder, copied

from ...helpers.refusals import refused
from ...pipelines.test_families import OF, denoiser, run
from .test_compiled import compiled, transformer

FLOAT32 = {torch.float32}
PRODUCTS = "oneDNN products"
pytestmark = pytest.mark.skipif(not CANDIDATES[PRODUCTS].fits(torch.float32), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """Adds a word that allows only oneDNN's products, which every processor runs."""
    monkeypatch.setitem(ATTENTION, "ours", (PRODUCTS,))


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
    with FastOperators("ours", FLOAT32):
        y = F.scaled_dot_product_attention(*args, **options)
    assert torch.equal(y, wanted)
    assert y.requires_grad == wanted.requires_grad
    torch.manual_seed(0)
    assert torch.equal(attended(*args, **options, word="ours"), wanted)


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_not_ours_is_torchs_in_a_graph_too(name):
    args, options = NOT_OURS[name]
    function = compiled(lambda: F.scaled_dot_product_attention(*args, **options), "eager")
    torch.manual_seed(0)
    wanted = F.scaled_dot_product_attention(*args, **options)
    torch.manual_seed(0)
    with FastOperators("ours", FLOAT32):
        y = function()
    torch.testing.assert_close(y, wanted)
    assert y.requires_grad == wanted.requires_grad


def test_what_torch_refuses_is_refused():
    with FastOperators("ours", FLOAT32), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(Q, Q, Q, torch.zeros(3, 300))
    with FastOperators("ours", FLOAT32), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(Q, Q.bfloat16(), Q)


def test_autocast_is_torchs():
    with torch.autocast("cpu", torch.bfloat16), FastOperators("ours", FLOAT32):
        assert F.scaled_dot_product_attention(Q, Q, Q).dtype == torch.bfloat16


class Model(nn.Module):
    """Attention to itself; tells whose it was."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.inside: list[bool] = []

    def forward(self, x, fail=None):
        self.inside.append(isinstance(torch.overrides._get_current_function_mode(), FastOperators))
        if fail:
            raise fail
        return F.scaled_dot_product_attention(self.to_q(x), x, x)


def outside():
    return torch.overrides._get_current_function_mode() is None


@torch.no_grad()
def test_it_lasts_as_long_as_a_forward_and_comes_with_a_copy():
    model, x = Model(), Q[0]
    wanted = model(x)
    accelerate(model, attention="ours")
    accelerate(model, attention="ours")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for each in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        y = each(x)
        assert each.inside[-1]
        assert outside()
        assert torch.allclose(y, wanted, atol=1e-6)
    for options in ({"backend": "reference"}, {"attention": False}, {"attention": "torch"}):
        accelerate(model, attention="ours")
        accelerate(model, **options)
        assert torch.equal(model(x), wanted)
        assert not model.inside[-1]
        assert not model._forward_hooks
        assert not model._forward_pre_hooks


def test_a_forward_that_fails_leaves_nothing_behind():
    model = Model()
    attend(model, "ours")
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
    attend(model, "ours")
    model(Q[0])
    assert found == [True]
    assert model.inside == [True]


@torch.no_grad()
def test_a_transformer_puts_out_what_it_did():
    model = transformer("W8A16", size=64)
    attend(model, "ours")
    inputs = torch.randn(1, 16, 64, 64), torch.randn(1, 70, 16), torch.randn(1, 8), torch.tensor([500.0])
    y = model(*inputs)[0]
    attend(model, None)
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
    products = CANDIDATES[PRODUCTS]
    monkeypatch.setattr(operators, "LEAST_SCORES", 0)
    monkeypatch.setitem(CANDIDATES, PRODUCTS, products._replace(run=lambda *a: taken.append(1) or products.run(*a)))
    attend(module, "ours")
    y = output()
    assert taken
    assert torch.allclose(y, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("word", ["auto", "float", "torch", True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_word_computes_what_torch_does(word, dtype):
    model, x = Model().to(dtype), Q[0].to(dtype)
    wanted = model(x)
    accelerate(model, attention=word)
    torch.testing.assert_close(model(x), wanted, rtol=0.02, atol=0.02)
    assert outside()


@pytest.mark.parametrize("word", ["fast", "", None, 3, ["torch"]])
def test_an_unknown_word_is_refused(word):
    refused(lambda: accelerate(Model(), attention=word), 2, "attention", "auto, float, integers, torch", repr(word))


LAYERS = {
    "linear": (nn.Linear(40, 7), (1, 20, 40)),
    "linear without bias": (nn.Linear(40, 7, bias=False), (20, 40)),
    "linear, many rows": (nn.Linear(40, 7), (2, 300, 40)),
    "convolution": (nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (2, 6, 9, 9)),
    "convolution over time": (nn.Conv3d(3, 4, (1, 2, 2)), (1, 3, 2, 8, 8)),
}


def in_float32_everywhere(dtype):
    """Returns a mode that computes all float layers of a dtype in float32, as on a processor that is slow in it."""
    mode = FastOperators("torch", FLOAT32)
    mode.few = mode.many = mode.convolutions = (dtype,)
    return mode


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float_layers_in_float32_are_rounded_once(name, dtype):
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(LAYERS[name][0]).to(dtype), LAYERS[name][1]
    x = torch.randn(shape).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    with in_float32_everywhere(dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert torch.allclose(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_few_rows_gradients_and_autocast_leave_layers_to_torch():
    torch.manual_seed(0)
    layer = nn.Linear(300, 5).bfloat16()
    few, many = torch.randn(2, 300).bfloat16(), torch.randn(50, 300).bfloat16()
    with in_float32_everywhere(torch.bfloat16):
        assert layer(many).requires_grad
        with torch.no_grad():
            y = layer(few)
            with torch.autocast("cpu", torch.float16):
                assert layer(many).dtype == torch.float16
    assert torch.equal(y, layer(few))


@torch.no_grad()
def test_layers_in_float32_are_in_one_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(2), nn.Linear(256, 9)).bfloat16()
    mode, x = in_float32_everywhere(torch.bfloat16), torch.randn(4, 3, 17, 17).bfloat16()
    model.register_forward_pre_hook(mode.enter)
    model.register_forward_hook(mode.leave, always_call=True)
    wanted = model(x)
    torch.testing.assert_close(compiled(model, fullgraph=True)(x), wanted)
    assert outside()
