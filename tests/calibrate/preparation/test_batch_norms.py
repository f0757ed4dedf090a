"""Batch norms fold into convolutions where, and only where, the function stays the same."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from octavo.calibrate.preparation.batch_norms import Pair, fold_norms, merged, pairs_of

from ...helpers.refusals import refused
from ...zoo.convolutions import CHANNELS, Residual, geometries, pictures, small, with_statistics
from ...zoo.toy import Call


def call_of(x: Tensor) -> Call:
    return Call((x,), {})


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().norm() / other.detach().norm())


@settings(max_examples=60, deadline=None)
@given(geometries(), geometries(), st.integers(0, 2**31))
def test_every_geometry_folds_without_changing_the_output(first, second, seed):
    torch.manual_seed(seed)
    model = with_statistics(nn.Sequential(nn.Sequential(Residual(first, second))), seed)
    x = torch.randn(2, CHANNELS, 20, 19)
    with torch.no_grad():
        before = model(x)
        made = fold_norms(model, call_of(x))
        assert len(made.pairs) == 2
        assert norms(made.model) == 0
        assert relative(made.model(x), before) < 1e-5
        assert torch.equal(model(x), before)
    assert norms(model) == 2


def test_the_model_itself_changes_only_when_asked():
    model = small()
    state = copy.deepcopy(model.state_dict())
    made = fold_norms(model, call_of(pictures()[0]))
    assert made.model is not model
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert fold_norms(model, call_of(pictures()[0]), changing=True).model is model
    assert norms(model) == 0


def test_a_model_without_batch_norms_is_not_copied():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    assert fold_norms(model, call_of(pictures()[0])).model is model


class Net(nn.Module):
    """A convolution and a batch norm, and a way to use them."""

    def __init__(self, use, **options) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options)
        self.other, self.use = nn.Conv2d(3, 4, 3), use
        self.cache: Tensor | None = None

    def forward(self, x: Tensor):
        return self.use(self, x)


def twice_read(net, x):
    y = net.conv(x)
    return net.norm(y) + y


def viewed(net, x):
    y = net.conv(x)
    return net.norm(y) + y[:, :1].detach()


def changed_before(net, x):
    return net.norm(net.conv(x).relu_())


def returned(net, x):
    y = net.conv(x)
    return {"features": y, "out": net.norm(y)}


def cached(net, x):
    net.cache = net.conv(x)
    return net.norm(net.cache)


def two_sources(net, x):
    return net.norm(net.conv(x)) + net.norm(net.other(x))


def weight_read(net, x):
    return net.norm(net.conv(x)) * net.conv.weight.square().sum()


def norm_alone_too(net, x):
    return net.norm(net.conv(x)) + net.norm(torch.ones(1, 4, 1, 1))


def norm_first(net, x):
    return net.other(net.norm(net.conv(x).abs())[:, :3])


OTHERS = [
    twice_read, viewed, changed_before, returned, cached, two_sources, weight_read, norm_alone_too, norm_first,
]  # fmt: skip


@pytest.mark.parametrize("use", OTHERS, ids=lambda use: use.__name__)
def test_what_something_else_reads_is_left_alone(use):
    model = with_statistics(Net(use))
    assert pairs_of(model, call_of(pictures()[0])) == ()
    assert fold_norms(model, call_of(pictures()[0])).model is model


def chained(net, x):
    return net.norm(net.conv(x))


def twice_called(net, x):
    return net.norm(net.conv(x)) + net.norm(input=net.conv(input=2 * x))


@pytest.mark.parametrize("use", [chained, twice_called], ids=lambda use: use.__name__)
def test_what_the_norm_alone_reads_is_folded(use):
    model, x = with_statistics(Net(use)), pictures()[0]
    made = fold_norms(model, call_of(x))
    assert made.pairs == (Pair("conv", "norm"),)
    assert relative(made.model(x), model(x)) < 1e-5


def test_a_norm_of_the_batch_itself_is_left_alone():
    assert pairs_of(Net(chained, track_running_stats=False).eval(), call_of(pictures()[0])) == ()


def test_hooks_and_subclasses_are_left_alone():
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = with_statistics(Net(chained))
    model.conv.register_forward_hook(lambda module, args, output: output.abs())
    assert pairs_of(model, call_of(pictures()[0])) == ()
    replaced = with_statistics(Net(chained))
    replaced.conv.forward = replaced.other.forward
    assert pairs_of(replaced, call_of(pictures()[0])) == ()
    other = with_statistics(nn.Sequential(Scaled(3, 4, 3), nn.BatchNorm2d(4)))
    assert pairs_of(other, call_of(pictures()[0])) == ()


def test_a_shared_pair_stays_shared():
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
    model = with_statistics(nn.ModuleDict({"a": block, "b": block}))
    chain = with_statistics(nn.Sequential(model["a"], nn.ReLU(), model["b"]))
    x = pictures()[0]
    made = fold_norms(chain, call_of(x)).model
    assert made[0] is made[2]
    assert relative(made(x), chain(x)) < 1e-5


def test_a_model_that_looks_into_its_norms_is_left_alone():
    def looking(net, x):
        return net.norm(net.conv(x)) * net.norm.running_var.sum()

    model = with_statistics(Net(looking))
    made = fold_norms(model, call_of(pictures()[0]))
    assert made.model is model
    assert "they are not folded" in made.warning
    assert norms(fold_norms(model, call_of(pictures()[0]), changing=True).model) == 1


def test_what_runs_otherwise_in_training_is_folded_as_it_evaluates():
    model = small().train()
    made = fold_norms(model, call_of(pictures()[0]))
    assert len(made.pairs) == 5
    assert model.training
    assert made.model.training
    assert made.model.eval()(pictures()[1]).allclose(model.eval()(pictures()[1]), atol=1e-4)


def test_a_model_that_cannot_be_copied_is_refused():
    model = with_statistics(Net(chained))
    model.cache = model.conv.weight * 2  # part of a graph
    refused(lambda: fold_norms(model, call_of(pictures()[0])), 2, "cannot be copied")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_folded_convolution_has_the_dtype_of_the_model(dtype):
    conv, norm = nn.Conv2d(3, 4, 3, bias=False).to(dtype), with_statistics(nn.BatchNorm2d(4)).to(dtype)
    made = merged(conv, norm)
    assert made.weight.dtype == made.bias.dtype == dtype
