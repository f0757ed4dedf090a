"""Values on disk and back: the same bits in the same layout."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.calibrate.blockwise.spill import Spill, SpilledTensor, SpillFile
from octavo.calibrate.replay.calls import replaced
from octavo.capture.files import OutputFile

from ...helpers.refusals import refused
from ...zoo.toy import DTYPES

LAYOUTS = {
    "whole": lambda x: x,
    "turned": lambda x: x.transpose(0, 2),
    "a part": lambda x: x[:, 1:3],
    "every other": lambda x: x[..., ::2],
    "repeated": lambda x: x[:1].expand(3, -1, -1),
    "nothing": lambda x: x[:0],
    "one": lambda x: x[0, 0, 0],
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_come_back_as_they_were(layout, dtype, tmp_path):
    x = LAYOUTS[layout](torch.arange(-30, 30).view(3, 4, 5).to(dtype))
    spill = Spill(tmp_path)
    with spill.writing() as first, spill.writing() as second:
        kept = [second.put(x), *first.put((None, {"a": [x, "word"]}, x + 1 if dtype != torch.bool else ~x))]
    alone, nothing, named, other = replaced(kept, SpilledTensor, SpilledTensor.read)
    assert nothing is None
    assert named["a"][1] == "word"
    for made in (alone, named["a"][0]):
        assert (made.dtype, made.shape) == (x.dtype, x.shape)
        assert torch.equal(made, x)
        assert made.stride() == x.stride() or layout == "repeated"
    assert torch.equal(other, x + 1 if dtype != torch.bool else ~x)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_can_be_filled_with_a_value_in_its_layout(tmp_path):
    x = torch.randn(3, 4, 5).transpose(0, 1)
    with Spill(tmp_path).writing() as file:
        filled: Tensor = file.put(x).filled(float("nan"))
    assert (filled.shape, filled.stride(), filled.dtype) == (x.shape, x.stride(), x.dtype)
    assert bool(filled.isnan().all())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_named():
    descriptor = os.open("/dev/full", os.O_WRONLY)
    refused(
        lambda: SpillFile(Path("spill-1"), OutputFile(descriptor)).put([torch.ones(3)]),
        5,
        "spill-1: no space left. Free space",
    )
    os.close(descriptor)
