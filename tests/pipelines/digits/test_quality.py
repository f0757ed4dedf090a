"""Checks the quality of the bundled classifier of digits on held-out pictures, in float and in integers."""

import numpy as np
import pytest
import torch

from octavo import Calibrator, QuantConfig
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.preparation.batch_norms import fold_norms
from octavo.calibrate.preparation.synthetic_inputs import synthetic_calls
from octavo.calibrate.replay.user_data import Sample
from octavo.calibrate.settings import RECIPES, Settings
from octavo.pipelines.classifier import classifier_directory
from octavo.pipelines.digits.data import digits
from octavo.pipelines.digits.train import inputs_of, moved, train
from octavo.pipelines.images import preprocessing_of

from ...zoo.convolutions import with_statistics
from ...zoo.digits import bundled, measured, quality
from ...zoo.resnet import resnet18, resnet50


@pytest.fixture(scope="module")
def data():
    return bundled()


def calls(x, batch=8):
    return [Sample((part,), {}) for part in x.split(batch)]


def test_the_float_model_is_right_and_small(data):
    assert quality(data.exact, data.exact, data.labels).accuracy > 0.985
    files = list(classifier_directory("digits").glob("*"))
    assert sum(file.stat().st_size for file in files) < 2_000_000


def test_nothing_held_out_was_trained_on():
    training, held_out = digits()
    assert len(training.labels) + len(held_out.labels) == 1797
    assert set(held_out.labels) == set(range(10))
    every = np.concatenate([training.pictures, held_out.pictures]).reshape(1797, -1)
    assert len(np.unique(every, axis=0)) == 1797


@pytest.mark.parametrize("recipe", ["plain", "balanced"])
def test_quality_after_calibration_with_pictures(data, recipe):
    exact = quality(data.exact, data.exact, data.labels)
    result = measured(data, calls(data.training[:64]), Settings(**RECIPES[recipe]))
    assert result.accuracy >= exact.accuracy - 0.005
    assert result.agreement >= 0.99
    assert result.sqnr >= 25


def test_synthetic_inputs_suffice_and_noise_does_not(data):
    exact = quality(data.exact, data.exact, data.labels)
    result = measured(data, synthetic_calls(data.model, [1, 3, 32, 32], most=15), Settings())
    assert result.accuracy >= exact.accuracy - 0.01
    assert result.agreement >= 0.99
    noise = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert measured(data, calls(noise), Settings()).accuracy < exact.accuracy - 0.1


@pytest.mark.parametrize("maker", [resnet18, resnet50])
def test_the_documented_snippet_runs_on_a_plain_resnet(maker):
    torch.manual_seed(0)
    model = with_statistics(maker(width=8, classes=10))
    x = torch.randn(2, 3, 64, 64)
    config = QuantConfig(
        disable_names=[], amp_num=0, input_shape=[1, 3, 64, 64],
        keep_acc={"admm": [False, 1000], "easy_quant": [False, 1000], "round_opt": False}, sigma=25,
    )  # fmt: skip
    calibrator = Calibrator(model, config, [[x]])
    calibrator.run()
    report = calibrator.result.report
    count = sum(isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) for module in model.modules())
    assert report["totals"] | {"quantized": count, "kept_float": 0} == report["totals"]
    assert len(report["folded"]) == count - 1
    with torch.no_grad():
        exact = model(x)
        assert (fold_norms(model, Sample((x,), {})).model(x) - exact).norm() < 1e-5 * exact.norm()
        with quantized(calibrator.model, calibrator.result.layers):
            assert (calibrator.model(x) - exact).norm() < 0.2 * exact.norm()


def test_pictures_are_moved_within_black():
    x = inputs_of(digits()[0], preprocessing_of(classifier_directory("digits")))[:8]
    pictures = moved(x, torch.Generator().manual_seed(0))
    assert pictures.shape == x.shape
    assert float(pictures.min()) >= float(x.min()) - 1e-5
    assert not torch.equal(pictures, x)


@pytest.mark.slow
def test_training_again_is_as_good(data):
    training, _ = digits()
    model = train(data.training, torch.from_numpy(training.labels))
    with torch.no_grad():
        logits = model(data.held_out).logits
    assert quality(logits, logits, data.labels).accuracy > 0.985
