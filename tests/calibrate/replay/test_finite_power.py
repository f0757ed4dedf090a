"""Outputs that are not finite are refused when the SQNR is measured, and the message names the model."""

import pytest
import torch

from octavo.calibrate.replay.sqnr import power_of

from ...helpers.refusals import refused


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_output_that_is_not_finite_is_refused_and_its_model_named(value):
    sound, broken = torch.ones(3), torch.tensor([1.0, value, 1.0])
    assert power_of([[sound]], [[sound + 0.5]]).checked().noise > 0
    refused(power_of([[sound]], [[broken]]).checked, 6, "output of the integer model")
    refused(power_of([[broken]], [[sound]]).checked, 6, "output of the float model")
