"""Checks that the block of a Listener with a directory writes a capture, and that no call is recorded outside of it."""

import logging
from contextlib import suppress

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from octavo.capture.listener import Listener
from octavo.capture.store.reader import Capture

from ..helpers.refusals import enter_and_leave, refused
from ..zoo.pipelines import make, run
from ..zoo.wrapped import Denoiser


def call(module, timestep: float = 1.0) -> None:
    module(torch.ones(2, 8), torch.tensor(timestep))


def test_a_call_outside_of_the_block_of_a_directory_is_refused(tmp_path):
    listener = Listener(Denoiser(), tmp_path / "captured")
    refused(lambda: call(listener), 2, "only written inside a with block", "`with listener:`")
    with listener:  # follows the message
        call(listener)
    assert len(list(Capture.open(tmp_path / "captured").calls())) == 1
    refused(lambda: call(listener), 2, "put listener.module back")
    call(listener.module)


def test_a_block_that_failed_leaves_no_calls_and_may_be_run_again(tmp_path):
    module = Denoiser()
    listener = Listener(module, tmp_path / "captured")
    for again in (listener, Listener(module, tmp_path / "captured"), listener):
        with suppress(KeyboardInterrupt), again:
            call(module, 9.0)
            raise KeyboardInterrupt
    with listener:
        call(module, 3.0)
    (stored,) = Capture.open(tmp_path / "captured").calls()
    assert (stored.kwargs["timestep"], stored.index, stored.step) == (3.0, 0, 0)


def test_two_listeners_do_not_write_one_directory(tmp_path):
    module = Denoiser()
    first, second = (Listener(module, tmp_path / "captured") for _ in range(2))
    with first:
        refused(lambda: enter_and_leave(second), 5, "in use")
        refused(lambda: enter_and_leave(first), 2, "Enter it once")
        call(module)
    refused(lambda: enter_and_leave(second), 5, "already holds a capture", "another directory")
    assert len(list(Capture.open(tmp_path / "captured").calls())) == 1
    assert not module._forward_pre_hooks


def test_blocks_of_one_listener_may_be_nested_in_memory():
    module = Denoiser()
    with Listener(module) as listener:
        with listener:
            call(module)
        call(module)
    call(module)
    assert len(listener.inputs) == 2
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("standing_in", [True, False])
def test_processors_that_a_pipeline_swaps_are_warned_of_once(standing_in, caplog):
    pipe, arguments = make("sdxl")
    module = pipe.unet
    own = module.attn_processors
    listener = Listener(module)
    if standing_in:
        pipe.unet = listener
        run(pipe, arguments)
    assert listener.swapped == 0
    other = own | {next(iter(own)): AttnProcessor()}
    listener = Listener(module)
    if standing_in:
        pipe.unet = listener
        pipe.unet.set_attn_processor(dict(other))
        run(pipe, arguments)
    else:
        with listener:
            module.set_attn_processor(dict(other))
            run(pipe, arguments)
            module.set_attn_processor(dict(own))
    module.set_attn_processor(dict(own))
    assert listener.swapped == 1
    with caplog.at_level(logging.WARNING):
        assert listener.inputs
        assert listener.inputs
    logged = [record.message for record in caplog.records if "replaces 1 attention processors" in record.message]
    assert len(logged) == 1
