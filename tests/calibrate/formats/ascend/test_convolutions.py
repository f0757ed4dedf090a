"""Convolutions of any geometry are written to an ascend checkpoint and read from it unchanged."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from octavo.calibrate.formats.ascend.read import load_ascend

from ....helpers.refusals import refused
from ....zoo.convolutions import CHANNELS, geometries
from ....zoo.layer_kinds import changed, content, frozen, layers_of, written


@settings(max_examples=25, deadline=None)
@given(geometries(), st.sampled_from(["W8A8", "W8A8_DYNAMIC", "W8A16"]))
def test_a_convolution_of_any_geometry_is_written_and_read(options, kind):
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, **options))
    layers = {"0": frozen(model[0], kind)}
    x = torch.randn(1, CHANNELS, 9, 9)
    with TemporaryDirectory() as folder:
        first = written(Path(folder) / "a", model, layers)
        loaded = load_ascend(first)
        assert loaded["0"].geometry == layers["0"].geometry
        assert torch.equal(loaded["0"](x), layers["0"](x))
        assert content(written(Path(folder) / "b", model, loaded)) == content(first)


@pytest.mark.parametrize("groups", [0, 3, -1, "two", None])
def test_numbers_of_groups_that_no_export_writes_are_refused(tmp_path, groups):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    folder = written(tmp_path / "out", model, {"0": frozen(model[0], "W8A8")})
    geometry = {"0": {**layers_of(model, {"0": "W8A8"})["0"].geometry._asdict(), "groups": groups}}
    changed(folder, lambda tensors: None, {"octavo.geometry": json.dumps(geometry)})
    refused(lambda: load_ascend(folder), 3)
