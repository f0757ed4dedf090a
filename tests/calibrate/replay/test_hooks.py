"""Observing replay: it hears all inputs, changes nothing, and names the call that fails."""

import pytest
import torch
from torch import nn

from octavo.calibrate.observers.observers import MinMax, Options
from octavo.calibrate.replay import calls as calls_module
from octavo.calibrate.replay.hooks import Readings, observe

from ...helpers.refusals import refused
from ...zoo.toy import Call, calls, toy


def minmax(model: nn.Module, *names: str) -> dict[str, MinMax]:
    return {name: MinMax(Options()) for name in names}


def test_positional_and_keyword_inputs_are_heard_and_nothing_is_left_behind():
    model = toy()
    model.blocks[1].train()
    observers = minmax(model, "patch", "blocks.0.up", "blocks.0.down", "proj_out", "unused")
    heard: list[torch.Tensor] = []
    handle = model.blocks[0].down.register_forward_hook(lambda m, a, k, y: heard.append(k["input"]), with_kwargs=True)
    exact = model(*calls()[0].args, **calls()[0].kwargs)
    heard.clear()
    assert observe(model, observers, calls()) == 3
    handle.remove()
    assert observers["blocks.0.down"].range() == (
        min(float(x.min()) for x in heard), max(float(x.max()) for x in heard)
    )  # fmt: skip
    with pytest.raises(ValueError, match="no input was observed"):
        observers["unused"].range()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model.blocks[1].up.training
    assert not model.proj_out.training
    assert torch.equal(model(*calls()[0].args, **calls()[0].kwargs), exact)


def test_a_layer_called_several_times_with_any_rank_and_with_no_rows():
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, *inputs: torch.Tensor) -> None:
            for x in inputs:
                self.layer(x)

    model = Reused()
    inputs = (*(torch.full((*[1] * rank, 3), float(rank)) for rank in range(1, 5)), torch.zeros(0, 3))
    observers = minmax(model, "layer")
    observe(model, observers, [Call(inputs, {})])
    assert observers["layer"].range() == (1.0, 4.0)


def test_a_tensor_that_three_layers_share_is_read_once():
    count = 0

    def read(x: torch.Tensor) -> float:
        nonlocal count
        count += 1
        return float(x.sum())

    readings = Readings(read)
    x = torch.ones(3)
    assert [readings.of(x) for _ in range(3)] == [3.0] * 3
    assert count == 1
    x.add_(1)  # changed in place: the same tensor with other values
    assert readings.of(x) == 6.0
    del x
    assert readings.of(torch.zeros(3)) == 0.0
    with torch.inference_mode():
        y = torch.ones(2)
        assert readings.of(y) == 2.0
        y.add_(1)
        assert readings.of(y) == 4.0


def refused_call(sample: Call, code: int, *words: str) -> None:
    """The call is the third of a toy; no hook is left behind."""
    model = toy()
    good = calls(2)
    observers = minmax(model, *(name for name, m in model.named_modules() if isinstance(m, nn.Linear)))
    refused(lambda: observe(model, observers, [*good, sample]), code, *words)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_arguments_that_forward_does_not_take_are_named():
    refused_call(Call((torch.zeros(1, 3, 4, 4),), {"guidance": 1}, 5), 4, "call 3, step 5", "'guidance'")
    refused_call(Call((), {"scale": 1.0}), 4, "'x'")


def test_a_shape_that_does_not_fit_names_call_step_and_layer():
    refused_call(Call((torch.zeros(1, 4, 4, 4),), {}, 7), 4, "call 3, step 7, layer patch")


def test_values_that_are_not_finite_name_layer_and_call():
    x = torch.zeros(1, 3, 4, 4)
    x[0, 0, 0, 0] = float("inf")
    refused_call(Call((x,), {}, 2), 6, "call 3, step 2: layer blocks.0.up: its input is not finite (", "not finite")


def test_running_out_of_memory_is_told_apart():
    class Large(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.empty(1 << 60)

    refused(lambda: calls_module.run(Large(), Call((torch.zeros(1),), {}), 0), 7, "out of memory on cpu at call 1")


def test_no_calls_are_refused():
    refused(lambda: observe(toy(), {}, []), 4, "calls: there are no calls to replay")


def test_a_model_whose_cache_skips_blocks_is_refused():
    model = toy()
    model.is_cache_enabled = True
    refused(lambda: observe(model, {}, calls()), 4, "disable_cache")


def test_gradients_are_not_recorded_and_tensors_are_no_inference_tensors():
    seen = []

    class Asking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return x

    observe(Asking(), {}, [Call((torch.zeros(1),), {})])
    assert seen == [(False, False)]
