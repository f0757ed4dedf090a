"""Checks that a Recorder stores every call, changes none, and that a replay returns the recorded output."""

import pytest
import torch
from torch import nn

from octavo.capture.listener import Listener
from octavo.capture.recorder import Clock, Memory, Recorder, bind, copied
from octavo.capture.store.reader import Capture
from octavo.pipelines.denoisers import denoisers

from ..helpers.refusals import enter_and_leave, refused
from ..zoo.pipelines import TINY, make, run


class Outputs:
    """Forward hooks that store copies of what each module returned, in order."""

    def __init__(self, modules):
        self.tensors = {name: [] for name in modules}
        for name, module in modules.items():
            module.register_forward_hook(lambda m, a, out, name=name: self.tensors[name].append(copied(first(out))))


def first(output):
    return output[0] if isinstance(output, tuple) else output.sample


@pytest.mark.parametrize("name", TINY)
def test_replaying_a_stored_call_gives_the_recorded_output_bit_for_bit(name, tmp_path):
    plain, arguments = make(name)
    expected = run(plain, arguments)
    pipe, arguments = make(name)
    modules = denoisers(pipe)
    outputs = Outputs(modules)
    clock, sinks = Clock(), {key: Memory() for key in modules}
    recorders = [Recorder(m, sinks[key], name=key, clock=clock) for key, m in modules.items()]
    for recorder in recorders:
        recorder.__enter__()
    picture = run(pipe, arguments)
    for recorder in recorders:
        recorder.__exit__(None, None, None)
    assert torch.equal(picture, expected), "recording changed the picture"
    assert sum(r.call_count for r in recorders) > 0
    recorded = {key: list(values) for key, values in outputs.tensors.items()}
    for key, module in modules.items():
        calls = sinks[key].calls
        assert len(calls) == len(recorded[key])
        for call, output in reversed(list(zip(calls, recorded[key], strict=True))):
            with torch.no_grad():
                again = first(module(*call.args, **copied(call.kwargs)))
            assert torch.equal(again, output)


def test_wan_has_two_denoisers_and_two_calls_a_step_with_their_contexts():
    pipe, arguments = make("wan22")
    modules = denoisers(pipe)
    assert set(modules) == {"transformer", "transformer_2"}
    clock, memory = Clock(), Memory()
    with (
        Recorder(modules["transformer"], memory, clock=clock),
        Recorder(modules["transformer_2"], memory, name="transformer_2", clock=clock),
    ):
        run(pipe, arguments)
    assert [call.context for call in memory.calls] == ["cond", "uncond"] * 4
    assert [call.step for call in memory.calls] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {call.component for call in memory.calls} == {"transformer", "transformer_2"}
    for module in modules.values():
        assert not module._forward_pre_hooks
        assert not getattr(module, "_diffusers_hook", None) or not module._diffusers_hook.hooks


def test_attention_processors_swapped_during_the_call_are_counted():
    from diffusers.models.attention_processor import AttnProcessor

    pipe, arguments = make("sdxl")
    with Recorder(pipe.unet, Memory()) as recorder:
        run(pipe, arguments)
    assert recorder.swapped == 0
    with Recorder(pipe.unet, Memory()) as recorder:
        own = pipe.unet.attn_processors
        name = next(iter(own))
        pipe.unet.set_attn_processor(own | {name: AttnProcessor()})
        run(pipe, arguments)
    assert recorder.swapped == 1


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, t=None, *, mask=None, **extra):
        return self.linear(x)


def test_positional_arguments_get_their_names_and_aliases_are_cut():
    module, x = Plain(), torch.ones(2, 3)
    listener = Listener(module)
    with listener:
        module(x, 5, mask=[x], other=1)
        x.add_(1)
    (call,) = listener.inputs
    assert set(call) == {"x", "t", "mask", "other"}
    assert call["t"] == 5
    assert torch.equal(call["x"], torch.ones(2, 3))
    assert torch.equal(call["mask"][0], torch.ones(2, 3))


def test_a_signature_with_variadic_positionals_keeps_them_positional():
    import inspect

    def forward(x, *rest, y=1):
        return x

    assert bind(inspect.signature(forward), (1, 2, 3), {"y": 4}) == ((1, 2, 3), {"y": 4})
    assert bind(inspect.signature(forward), (1,), {"y": 4}) == ((), {"x": 1, "y": 4})


def test_two_listeners_do_not_share():
    one, two = Listener(Plain()), Listener(Plain())
    with one, two:
        one.module(torch.zeros(1, 3))
    assert (len(one.inputs), len(two.inputs)) == (1, 0)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_hooks_are_gone_whatever_ends_the_block(error):
    module = Plain()
    before = set(module.__dict__)
    try:
        with Listener(module):
            module(torch.zeros(1, 3))
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert not module._forward_pre_hooks
    assert set(module.__dict__) == before


def test_inference_tensors_are_cloned_to_ordinary_ones():
    module = Plain()
    listener = Listener(module)
    with torch.inference_mode(), listener:
        module(torch.zeros(1, 3))
    listener.inputs[0]["x"].add_(1)  # an inference tensor would refuse to be changed


def test_the_documented_form_stands_in_for_the_module():
    pipe, arguments = make("sd3")
    expected = run(pipe, arguments)
    real = pipe.transformer
    pipe.transformer = Listener(pipe.transformer)
    picture = run(pipe, arguments)
    listener = pipe.transformer
    assert torch.equal(picture, expected)
    assert len(listener.inputs) == arguments["num_inference_steps"]
    assert listener.config is real.config
    assert listener.dtype == real.dtype
    assert isinstance(listener, type(real))
    assert dict(listener.named_parameters()).keys() == dict(real.named_parameters()).keys()
    pipe.transformer = listener.module
    assert pipe.transformer is real
    assert not real._forward_pre_hooks
    assert pipe.config["transformer"] == ("diffusers", "SD3Transformer2DModel")


def test_a_listener_with_a_directory_writes_a_finished_capture(tmp_path):
    module = Plain()
    with Listener(module, tmp_path / "captured"):
        for value in range(3):
            module(torch.full((1, 3), float(value)), value)
    calls = list(Capture.open(tmp_path / "captured").calls())
    assert [call.kwargs["t"] for call in calls] == [0, 1, 2]
    assert [call.step for call in calls] == [0, 1, 2]


def test_a_listener_without_calls_is_refused(tmp_path):
    refused(lambda: enter_and_leave(Listener(Plain(), tmp_path / "captured")), 4, "never called")
    assert not list((tmp_path / "captured" / "units").iterdir())


def test_the_clock_follows_noise_levels_until_the_pipeline_speaks():
    clock = Clock()
    assert [clock.observe(level) for level in (9.0, 9.0, 5.0, None, 5.0, 1.0)] == [0, 0, 1, 1, 1, 2]
    clock.tick()
    assert [clock.observe(level) for level in (1.0, 0.5)] == [3, 3]
    clock.tick(0)  # the pipeline starts counting at 0 again
    assert clock.observe(0.5) == 4
