"""Calibration data in the forms that users have it in."""

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from octavo.calibrate.msmodelslim_api import Calibrator, QuantConfig
from octavo.calibrate.replay.user_data import calls_of

from ...helpers.refusals import refused
from ...zoo.convolutions import pictures, small


class Folder:
    """Gives its pictures anew each time, and counts them."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self):
        for x in pictures():
            self.read += 1
            yield x


@pytest.mark.parametrize(
    "form", [list, tuple, iter, lambda x: DataLoader(x, batch_size=None)], ids=["list", "tuple", "iterator", "loader"]
)
@pytest.mark.parametrize(
    "shape", [lambda x: x, lambda x: [x], lambda x: {"pixel_values": x}], ids=["bare", "list", "dict"]
)
def test_every_form_says_the_same(form, shape):
    calls = calls_of(form([shape(x) for x in pictures()]))
    for _ in range(2):
        found = [call.args[0] if call.args else call.kwargs["pixel_values"] for call in calls()]
        assert all(torch.equal(a, b) for a, b in zip(found, pictures(), strict=True))


def test_what_can_be_read_again_is_not_held():
    folder = Folder()
    calls = calls_of(folder)
    assert folder.read == 0
    first = next(iter(calls()))
    assert folder.read == 1
    assert torch.equal(first.args[0], pictures()[0])
    streamed, listed = Calibrator(small(), QuantConfig(), folder), Calibrator(small(), QuantConfig(), pictures())
    for calibrator in (streamed, listed):
        calibrator.run()
    assert streamed.get_quant_params()[0] == listed.get_quant_params()[0]
    assert folder.read > len(pictures())


def test_nothing_and_what_is_no_list():
    assert calls_of(None) is None
    assert calls_of([]) is None
    for value in (torch.zeros(3), {"x": 1}, "x", 3):
        refused(partial(calls_of, value), 3, "calib_data: expected a list")
    refused(lambda: calls_of([torch.zeros(1), 3]), 3, "calib_data[1]")
