"""Checks that calls of a wrapped module are recorded with the argument names of the module inside, or by position."""

import pytest
import torch
from torch import nn

from octavo.capture.fingerprint import fingerprint
from octavo.capture.listener import Listener
from octavo.capture.recorder import Memory, Recorder
from octavo.capture.store.reader import Capture
from octavo.capture.wrappers import inside

from ..helpers.refusals import refused
from ..zoo.wrapped import (
    NAMING,
    SEEN_THROUGH,
    Decorated,
    Denoiser,
    PositionalOnly,
    Reordering,
    Scaling,
    Straight,
    Twice,
    graph,
)

NAMES = {"sample", "timestep", "encoder_hidden_states"}
WRAPS = SEEN_THROUGH | NAMING


def positional() -> tuple[torch.Tensor, ...]:
    return torch.ones(2, 8), torch.tensor(5.0), torch.zeros(2, 3)


@pytest.fixture(autouse=True)
def graphs_of_other_tests_are_gone():
    torch.compiler.reset()


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_positional_arguments_have_the_names_of_the_module_inside(wrap, tmp_path):
    with torch.no_grad():
        wrapped = wrap(Denoiser())
        listener = Listener(wrapped)
        listener(*positional())
        with Listener(wrapped, tmp_path / "captured"):
            wrapped(*positional()[:2], encoder_hidden_states=None)
            wrapped(*positional())
    (call,) = listener.inputs
    stored = [stored_call.kwargs for stored_call in Capture.open(tmp_path / "captured").calls()]
    assert [set(arguments) for arguments in (call, *stored)] == [NAMES] * 3
    assert torch.equal(call["sample"], torch.ones(2, 8))
    assert call["timestep"] == 5
    assert stored[0]["encoder_hidden_states"] is None


@pytest.mark.parametrize("module", [PositionalOnly, Straight, Reordering, Twice], ids=lambda kind: kind.__name__)
def test_a_call_without_names_is_refused_or_stored_by_position(module, tmp_path):
    wrapped = module() if module in (PositionalOnly, Twice) else module(Denoiser())
    arguments = positional()[1::-1] if module is Reordering else positional()
    refused(
        lambda: Listener(wrapped)(*arguments), 2, f"{module.__name__}.forward: {len(arguments)} positional arguments"
    )
    with Listener(wrapped, tmp_path / "captured"):
        expected = wrapped(*arguments)
    (call,) = Capture.open(tmp_path / "captured").calls()
    assert torch.equal(wrapped(*call.args, **call.kwargs), expected)


def test_arguments_that_change_before_they_get_their_names_are_refused():
    refused(
        lambda: Listener(Scaling(Denoiser()))(*positional()),
        2,
        "Scaling.forward: takes *args and changes them in place",
    )
    compiled = graph(Decorated(Denoiser()))
    refused(lambda: Listener(compiled)(*positional()), 2, "positional arguments have no names")


@pytest.mark.parametrize("wrap", SEEN_THROUGH.values(), ids=SEEN_THROUGH)
def test_wrappers_are_looked_through_by_their_class(wrap):
    module = Denoiser()
    wrapped = wrap(module)
    assert type(inside(wrapped)) is Denoiser
    assert inside(Listener(wrapped)) is inside(wrapped)
    assert inside(Listener(Listener(module))) is module
    assert fingerprint(wrap(module)) == fingerprint(module)


def test_a_child_called_module_does_not_make_a_wrapper():
    class Odd(nn.DataParallel):
        def forward(self, *args):
            return 2 * super().forward(*args)

    for outer in (Decorated(Denoiser()), Odd(Denoiser())):
        assert inside(outer) is outer


def test_recording_keeps_the_graph_of_a_module_compiled_in_place():
    module = Denoiser()
    module.compile(backend="eager")
    graph_of_it, memory = module._compiled_call_impl, Memory()
    with torch.no_grad(), Recorder(module, memory):
        module(*positional())
    assert module._compiled_call_impl is graph_of_it
    module(*positional())
    assert len(memory.calls) == 1
    assert not module._forward_pre_hooks
