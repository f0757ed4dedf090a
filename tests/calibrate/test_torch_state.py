"""The global state of torch changes no integer of a calibration, and a calibration restores the state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.msmodelslim_api import Calibrator

from ..helpers.calibrators import calibrated, data, same
from ..zoo.toy import toy

METHODS = {"admm": [True, 5], "easy_quant": [True, 5]}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def low_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


STATES: dict[str, Callable[[], Any]] = {
    **{f"default {dtype}": partial(default_dtype, dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)},
    "default device": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "matmul precision": low_precision,
}


def state() -> tuple[Any, ...]:
    """Returns the global state of torch that a calibration could leave changed."""
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(), torch.get_rng_state().tolist(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> Calibrator:
    return calibrated(toy(), keep_acc=METHODS, act_method=2)


@pytest.mark.parametrize("entered", STATES.values(), ids=STATES)
def test_the_state_of_torch_changes_no_integer_and_stays(entered, plain, tmp_path):
    samples = data()
    model = toy()
    with entered():
        before = state()
        calibrator = calibrated(model, samples, keep_acc=METHODS, act_method=2)
        calibrator.export_quant_safetensor(tmp_path)
        assert state() == before
    same(calibrator, plain)
    layers = load_ascend(tmp_path)
    assert all(torch.equal(layers[name].weight, layer.weight) for name, layer in plain.result.layers.items())


def test_rounding_by_gradients_needs_no_state_of_torch():
    one = {"keep_acc": {"round_opt": True}, "disable_names": ["patch", "blocks.0", "blocks.1.up", "proj_out"]}
    model, samples = toy(4), data()
    with default_dtype(torch.bfloat16), torch.no_grad(), torch.inference_mode():
        calibrator = calibrated(model, samples, **one)
    same(calibrator, calibrated(toy(4), **one))


@pytest.mark.parametrize("entered", [torch.inference_mode, nullcontext])
def test_models_made_in_inference_mode_and_models_in_training_are_the_same(entered, plain):
    with entered():
        model, samples = toy(), data()
    model.train().blocks[0].eval()
    modes = [module.training for module in model.modules()]
    calibrator = calibrated(model, samples, keep_acc=METHODS, act_method=2)
    same(calibrator, plain)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_forward_may_rely_on_the_defaults_of_its_caller():
    class Relying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x + torch.ones(4))

    with default_dtype(torch.bfloat16):
        calibrator = calibrated(Relying(), [{"x": torch.ones(3, 4)}])
    assert calibrator.result.layers["proj"].weight.dtype == torch.int8
