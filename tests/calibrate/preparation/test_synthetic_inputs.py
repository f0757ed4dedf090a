"""Without calibration data, inputs are synthesized that have the statistics stored in batch norms."""

import copy
import logging

import pytest
import torch
from torch import nn

from octavo.calibrate.msmodelslim_api import Calibrator, QuantConfig
from octavo.calibrate.preparation.synthetic_inputs import statistics_losses, synthetic_calls, warnings_of
from octavo.calibrate.replay.calls import evaluating

from ...helpers.refusals import refused
from ...zoo.convolutions import Small, small, with_statistics
from ...zoo.toy import toy

SHAPE = [1, 3, 12, 12]


def lacking(model: nn.Module, x: torch.Tensor) -> float:
    with evaluating(model), statistics_losses(model) as losses:
        model(x)
    return float(torch.stack(losses).mean())


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network whose batch norms hold the statistics of inputs unlike noise: large, smooth, with a mean of 3."""
    torch.manual_seed(0)
    model, generator = Small(), torch.Generator().manual_seed(1)
    for _ in range(40):
        rough = torch.randn(16, 3, 3, 3, generator=generator)
        model(3 + 2 * nn.functional.interpolate(rough, size=(12, 12), mode="bilinear"))
    return model.eval()


def test_distilled_inputs_have_the_statistics_that_noise_has_not(trained):
    calls = synthetic_calls(trained, SHAPE, most=60)
    x = calls[0].args[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert lacking(trained, x) < 0.15 * lacking(trained, noise)
    assert x.mean() > 1  # the mean of the training inputs is 3; only the batch norms contain it


def test_inputs_are_the_same_twice_and_the_model_is_unchanged(trained):
    state = copy.deepcopy(trained.state_dict())
    one, two = (synthetic_calls(trained, SHAPE, most=10) for _ in range(2))
    assert all(torch.equal(a.args[0], b.args[0]) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].args[0], one[1].args[0])
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())
    assert not any(module._forward_pre_hooks for module in trained.modules())
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_the_batch_is_at_least_the_one_asked_for_and_progress_is_shown():
    steps = []

    def progress(label, items, total=None):
        for item in items:
            steps.append((label, total))
            yield item

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    calls = synthetic_calls(model, [40, 3, 6, 6], progress=progress)
    assert {tuple(call.args[0].shape) for call in calls} == {(40, 3, 6, 6)}
    assert len(steps) == steps[0][1] > 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_gets_inputs_distilled_in_float32(trained, dtype):
    model = copy.deepcopy(trained).to(dtype)
    x = synthetic_calls(model, [1, 3, 8, 8], most=10)[0].args[0]
    assert x.dtype == dtype
    assert x.isfinite().all()
    assert synthetic_calls(toy(dtype=dtype), [2, 3, 4, 4])[0].args[0].dtype == dtype


def test_without_batch_norms_uniform_numbers_and_a_warning(caplog):
    x = synthetic_calls(toy(), [2, 3, 4, 4])[0].args[0]
    assert x.shape == (2, 3, 4, 4)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    with caplog.at_level(logging.WARNING):
        calibrator = Calibrator(toy(), QuantConfig(input_shape=[2, 3, 4, 4]))
        calibrator.run()
    assert "uniform random numbers" in caplog.text
    assert calibrator.result.warnings == warnings_of(toy())
    assert warnings_of(small()) == []


@pytest.mark.parametrize(("shape", "code"), [([], 2), ([1, 0, 12, 12], 2), ([1, 4, 12, 12], 4), ([1, 3], 4)])
def test_shapes_that_do_not_fit(shape, code):
    refused(lambda: synthetic_calls(small(), shape), code)


def test_the_documented_snippet_without_data():
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 4)]
    model = with_statistics(nn.Sequential(*layers))
    before = copy.deepcopy(model)
    config = QuantConfig(
        disable_names=[], amp_num=0, input_shape=SHAPE,
        keep_acc={"admm": [False, 1000], "easy_quant": [False, 1000], "round_opt": False}, sigma=25,
    )  # fmt: skip
    calibrator = Calibrator(model, config)
    calibrator.run()
    report = calibrator.result.report
    assert report["folded"] == [{"conv": "0", "norm": "1"}]
    assert all(row["scheme"] == "W8A8" for row in report["layers"])
    assert repr(model) == repr(before)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.state_dict().items())


def test_inputs_are_distilled_in_inference_mode_too():
    plain = synthetic_calls(small(), SHAPE, most=2)
    with torch.inference_mode():
        inside = synthetic_calls(small(), SHAPE, most=2)  # the weights of this model are inference tensors
        assert torch.is_inference_mode_enabled()
    assert all(torch.allclose(one.args[0], two.args[0], atol=1e-5) for one, two in zip(plain, inside, strict=True))


def test_a_forward_without_gradients_is_refused():
    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    refused(lambda: synthetic_calls(Quiet().eval(), SHAPE), 2, "passes gradients on", "Give calib_data")
