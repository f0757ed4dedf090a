"""Layers that do something besides their weight stay float, with a reason."""

import types

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from octavo.calibrate.calibration import calibrate_folded
from octavo.calibrate.layers.changes import change_of
from octavo.calibrate.layers.install import quantized

from ...zoo.toy import Call


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(torch.relu(self.conv(x)).mean((2, 3)))))


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class Doubling:
    def __call__(self, layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (2 * args[0],)


def lora(net: Net) -> None:
    forward, down, up = net.fc.forward, torch.randn(2, 8), torch.randn(16, 2)
    net.fc.forward = lambda x: forward(x) + x @ down.T @ up.T


def tiled(net: Net) -> None:
    around = (1, 1, 1, 1)
    net.conv._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, around, mode="circular"), weight, bias)


def bound(net: Net) -> None:
    net.fc.forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), net.fc)


def subclass(**members) -> object:
    return lambda net: setattr(net.fc, "__class__", type("Changed", (nn.Linear,), members))


def assigned(net: Net) -> None:
    weight = net.fc.weight.detach()
    del net.fc.weight
    net.fc.weight = weight


# the change, the layer changed, words of its reason
CHANGES = {
    "hook": (lambda net: net.fc.register_forward_hook(lambda layer, args, y: 3 * y + 1), "fc", "hook <lambda>"),
    "hook before": (lambda net: net.fc.register_forward_pre_hook(Doubling()), "fc", "hook Doubling would be lost"),
    "lora": (lora, "fc", "its forward was replaced"),
    "bound method": (bound, "fc", "its forward was replaced"),
    "tiled": (tiled, "conv", "its _conv_forward was replaced"),
    "subclass": (subclass(forward=lambda self, x: 2 * F.linear(x, self.weight)), "fc", "Changed has no integer form"),
    "subclass, called": (subclass(__call__=lambda self, x: 2 * self.forward(x)), "fc", "Changed has no integer form"),
    "weight norm": (lambda net: weight_norm(net.conv), "conv", "computed by WeightNorm before each call"),
    "spectral norm": (lambda net: spectral_norm(net.fc), "fc", "computed by SpectralNorm"),
    "pruned": (lambda net: prune.l1_unstructured(net.fc, "weight", 0.5), "fc", "computed by L1Unstructured"),
    "pruned bias": (lambda net: prune.l1_unstructured(net.fc, "bias", 0.5), "fc", "hook L1Unstructured"),
    "parametrized": (lambda net: parametrizations.weight_norm(net.conv), "conv", "its weight is parametrized"),
    "bias": (
        lambda net: parametrize.register_parametrization(net.fc, "bias", Exponential()),
        "fc",
        "its bias is param",
    ),
    "no parameter": (assigned, "fc", "its weight is not a parameter"),
}
HARMLESS = {
    "nothing": lambda net: None,
    "backward hook": lambda net: net.fc.register_full_backward_hook(lambda *_: None),
    "state dict hook": lambda net: net.fc.register_state_dict_post_hook(lambda *_: None),
    "hook of the parent": lambda net: net.register_forward_hook(lambda layer, args, y: 3 * y + 1),
    "pruned for good": lambda net: prune.remove(prune.l1_unstructured(net.fc, "weight", 0.5), "weight"),
    "empty subclass": subclass(),
    "padding mode": lambda net: setattr(net.conv, "padding_mode", "circular"),
    "padding": lambda net: setattr(net.conv, "padding", (0, 2)),
    "reflecting": lambda net: setattr(net, "conv", nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")),
}


def calibrated(change) -> tuple[dict[str, str], float, list[str]]:
    """The reasons of the float layers, the least SQNR of the installed layers on any call, and the warnings."""
    torch.manual_seed(0)
    net, calls = Net().eval(), [Call((torch.randn(2, 3, 16, 16),), {}) for _ in range(6)]
    change(net)
    result, model = calibrate_folded(net, lambda: calls)
    worst = float("inf")
    with torch.no_grad():
        exact = [net(*call.args) for call in calls]
        with quantized(model, result.layers):
            for call, y in zip(calls, exact, strict=True):
                worst = min(worst, float(10 * (y.square().sum() / (y - model(*call.args)).square().sum()).log10()))
    return {entry.name: entry.reason for entry in result.plan.entries if not entry.scheme}, worst, result.warnings


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_layer_stays_float_and_says_why(name):
    change, layer, words = CHANGES[name]
    reasons, sqnr, warnings = calibrated(change)
    assert list(reasons) == [layer]
    assert words in reasons[layer]
    assert any(words in warning for warning in warnings)
    assert sqnr > 35


@pytest.mark.parametrize("name", HARMLESS)
def test_changes_that_leave_the_layer_s_output_alone_keep_it_quantized(name):
    reasons, sqnr, warnings = calibrated(HARMLESS[name])
    assert not reasons
    assert not warnings
    assert sqnr > 35


def test_a_forward_of_torch_s_class_that_was_replaced_is_seen(monkeypatch):
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
    reasons, _, _ = calibrated(HARMLESS["nothing"])
    assert reasons == dict.fromkeys(("fc", "out"), "forward of its class was replaced")


def test_hooks_around_every_module_are_warned_of():
    handle = nn.modules.module.register_module_forward_hook(lambda layer, args, y: None)
    try:
        _, _, warnings = calibrated(HARMLESS["nothing"])
    finally:
        handle.remove()
    assert [warning for warning in warnings if "around every module" in warning]


def test_a_forward_that_is_the_class_s_own_again_is_no_change():
    torch.manual_seed(0)
    net = Net().eval()
    add_hook_to_module(net.fc, AlignDevicesHook(io_same_device=True))
    remove_hook_from_module(net.fc)
    assert "forward" in vars(net.fc)
    assert change_of(net.fc) == ""
