"""Checks which components of a pipeline are recognized as denoisers."""

import warnings

import diffusers
import pytest

from octavo.pipelines.denoisers import denoisers, is_denoiser

from ..helpers.refusals import refused
from ..zoo.pipelines import make


def test_an_absent_component_is_refused_with_the_choices():
    pipe, _ = make("sd3")
    refused(lambda: denoisers(pipe, ("unet",)), 2, "no module 'unet'. Choose one of transformer, vae")
    assert list(denoisers(pipe, ("vae",))) == ["vae"]


@pytest.mark.parametrize(
    ("name", "expected"), [("sd3", ["transformer"]), ("sdxl", ["unet"]), ("wan22", ["transformer", "transformer_2"])]
)
def test_denoisers_are_found_and_nothing_else(name, expected):
    assert sorted(denoisers(make(name)[0])) == expected


def test_plain_settings_of_a_pipeline_are_left_alone():
    pipe, _ = make("wan22")
    assert pipe.config["boundary_ratio"] == 0.875
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # diffusers warns if a setting is read as an attribute
        denoisers(pipe)


def test_denoisers_are_recognized_by_their_class():
    def denoises(name: str) -> bool:
        kind = getattr(diffusers, name)
        return is_denoiser(kind.__new__(kind))

    for name in ("UVit2DModel", "PriorTransformer", "UNetMotionModel", "StableAudioDiTModel", "UNetControlNetXSModel"):
        assert denoises(name), name
    for name in ("AutoencoderKL", "ControlNetModel", "SD3ControlNetModel", "VQModel", "MotionAdapter", "T2IAdapter"):
        assert not denoises(name), name
