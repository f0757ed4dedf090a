"""Every format refuses, before it writes a file, layers that it cannot hold."""

from dataclasses import replace

import pytest

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats import TABLE, format_named
from octavo.calibrate.formats.export import check_scheme
from octavo.calibrate.formats.record import Deployment
from octavo.calibrate.layers.modules import build
from octavo.calibrate.layers.transforms import Multiply
from octavo.calibrate.settings import Settings
from octavo.capture.errors import UsageError
from octavo.capture.files import Modes

from ...helpers.refusals import refused
from ...zoo.toy import calls, source_of, toy


@pytest.mark.parametrize("name", TABLE)
def test_layers_without_a_form_are_refused_before_a_file_is_written(name, tmp_path):
    model, record = toy(), format_named(name)
    result = calibrate(model, source_of(calls()), Settings(defaults={}, sqnr_calls=0))
    layer = next(iter(result.layers))
    deployment = Deployment(None, None, {}, {}, 1, {})

    def write(**changes):
        replace(record, **({"schemes": ("W8A8",)} | changes)).write(result.layers, model, tmp_path, Modes(), deployment)

    refused(lambda: write(schemes=()), 2, f"format {name}: cannot hold layer {layer}, whose scheme is W8A8")
    numbers = result.layers[layer].numbers
    multiply = Multiply(numbers.weight_scale.new_ones(numbers.weight.shape[1]))
    result.layers[layer] = build(replace(numbers, transform=multiply), model.get_submodule(layer))
    refused(lambda: write(transforms=()), 2, f"{layer}, whose input goes through the transform Multiply")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "element", "activations"),
    [("ascend", "fp8", "static"), ("sdnq", "fp8", "dynamic"), ("modelopt", "mxfp8", "dynamic")],
)
def test_the_refusal_of_an_element_names_formats_that_hold_it(name, element, activations):
    with pytest.raises(UsageError, match=f"{name}: cannot hold {element}. Use --format .+, or --element") as refusal:
        check_scheme([name], element, activations)
    named = str(refusal.value).split("--format ")[1].split(", or --element")[0].split(" or ")
    check_scheme(named, element, activations)
