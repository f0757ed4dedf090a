"""A denoiser, and each copy of it, gives the noise level of the running call to its own layers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from octavo.calibrate.layers.install import install, quantized
from octavo.calibrate.layers.noise_level import levels_of
from octavo.calibrate.replay.sqnr import comparing

from ...helpers.refusals import refused
from ...zoo.layer_kinds import TimedToy, frozen, static_of

KINDS = ("W8A8", "W8A8_TIMESTEP", "W8A8_DYNAMIC", "W8A16")


@pytest.mark.parametrize("value", [500.0, 500, torch.tensor(500.0), torch.tensor([500]), torch.full((4,), 500.0)])
@pytest.mark.parametrize("name", ["timestep", "t", "sigma"])
def test_the_time_argument_in_all_its_forms(value, name):
    levels = levels_of({"hidden": torch.ones(3), name: value})
    assert (levels.ndim, levels.dtype, float(levels)) == (0, torch.float32, 500.0)


@pytest.mark.parametrize("value", [None, True, "now", torch.zeros(0)])
def test_invalid_noise_levels_are_ignored(value):
    assert levels_of({"timestep": value}) is None


@pytest.mark.parametrize("by_name", [True, False])
def test_a_model_gives_its_layers_the_noise_level_for_one_call_only(by_name):
    model = TimedToy()
    layers = {"up": frozen(model.up, "W8A8_TIMESTEP"), "down": frozen(model.down, "W8A8_TIMESTEP")}
    x, level = torch.randn(2, 5, 8), torch.tensor([600.0, 600.0])
    with quantized(model, layers):
        y = model(hidden=x, timestep=level) if by_name else model(x, level)
        refused(lambda: model.up(x), 4, "the noise level of this call is unknown")
        refused(lambda: model(x, None), 4, "the noise level of this call is unknown")
        with pytest.raises(TypeError):
            model(x)
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 5, 9), level)
        refused(lambda: model.up(x), 4)  # the level is forgotten after an error too
    with quantized(model, {name: static_of(model.get_submodule(name), 2) for name in layers}):
        assert torch.equal(model(x, level), y)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert layers["up"].noise_level is None


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_are_there_for_noise_levels_alone(kind):
    model = TimedToy()
    with quantized(model, {"up": frozen(model.up, kind)}):
        assert bool(model._forward_pre_hooks) == (kind == "W8A8_TIMESTEP")


def test_layers_that_are_installed_one_by_one_share_the_noise_level():
    model, x = TimedToy(), torch.randn(2, 5, 8)
    layers = {name: frozen(model.get_submodule(name), "W8A8_TIMESTEP") for name in ("up", "down")}
    with quantized(model, layers):
        wanted = model(x, 300.0)
    detach = install(model, {"up": layers["up"]})
    install(model, {"down": layers["down"]})
    assert len(model._forward_pre_hooks) == 1
    assert torch.equal(model(x, 300.0), wanted)
    detach()
    assert not model._forward_pre_hooks


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    sink = io.BytesIO()
    torch.save(model, sink)
    sink.seek(0)
    return torch.load(sink, weights_only=False)


@pytest.mark.parametrize("again", [copied, pickled, saved])
def test_layers_of_a_copied_model_use_its_own_noise_level(again):
    model, x = TimedToy(), torch.randn(2, 5, 8)
    install(model, {"up": frozen(model.up, "W8A8_TIMESTEP"), "down": frozen(model.down, "W8A8_TIMESTEP")})
    other = again(model)
    assert torch.equal(other(x, 300.0), model(x, 300.0))
    assert not torch.equal(other(x, 900.0), model(x, 300.0))
    assert other.up.noise_level is other.down.noise_level is not model.up.noise_level


def test_a_state_dict_carries_the_bins():
    model, other, x = TimedToy(), TimedToy(seed=1), torch.randn(2, 5, 8)
    for denoiser in (model, other):
        install(denoiser, {"up": frozen(denoiser.up, "W8A8_TIMESTEP")})
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, 600.0), model(x, 600.0))


def test_layers_are_compared_at_the_noise_level_of_the_call():
    model, x = TimedToy(), torch.randn(2, 5, 8)
    timed = frozen(model.up, "W8A8_TIMESTEP")
    with comparing(model, {"up": lambda: timed}) as powers:
        model(x, 300.0)
    with comparing(model, {"up": lambda: static_of(model.up, 1)}) as wanted:
        model(x, 300.0)
    assert powers["up"].sqnr == wanted["up"].sqnr
    assert timed.noise_level is None
    assert not model._forward_pre_hooks
