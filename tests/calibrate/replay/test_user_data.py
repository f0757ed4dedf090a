"""Calibration data may have the forms that users have, gives the same samples in every pass, and is checked."""

import re
from collections import namedtuple
from functools import partial

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from transformers import BatchFeature

from octavo.calibrate.msmodelslim_api import Calibrator, QuantConfig
from octavo.calibrate.replay.user_data import Passes, calls_of

from ...helpers.refusals import refused
from ...zoo.convolutions import pictures, small

Labelled = namedtuple("Labelled", "pixel_values labels")


class Folder:
    """Yields the pictures anew in each pass, and counts how many were read."""

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
def test_every_form_of_data_gives_the_same_calls(form, shape):
    calls = calls_of(form([shape(x) for x in pictures()]))
    for _ in range(2):
        tensors = [call.args[0] if call.args else call.kwargs["pixel_values"] for call in calls()]
        assert all(torch.equal(a, b) for a, b in zip(tensors, pictures(), strict=True))


def test_what_can_be_read_again_is_read_once():
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
    assert folder.read == 1 + len(pictures())


def test_missing_data_gives_none_and_anything_but_a_list_is_refused():
    assert calls_of(None) is None
    assert calls_of([]) is None
    for value in (torch.zeros(3), torch.zeros(3).numpy(), {"x": 1}, "x", 3):
        refused(partial(calls_of, value), 3, "calib_data: expected a list", "in a list.")
    refused(lambda: calls_of(TensorDataset(torch.zeros(3, 1))), 3, "found TensorDataset. Give a DataLoader of it.")
    refused(lambda: calls_of([torch.zeros(1), 3]), 3, "calib_data[1]")


class Cropped(Dataset):
    """Returns a random crop of a picture each time it is read."""

    def __init__(self) -> None:
        self._pictures = pictures()  # pictures() seeds torch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        offset = int(torch.randint(0, 3, ()))
        return self._pictures[index % 2][0, :, :, offset : offset + 6]


class Drawn(IterableDataset):
    def __iter__(self):
        return (torch.randn(2, 3, 8, 8) for _ in range(4))


class OneBuffer:
    """Yields one tensor several times, with other values each time."""

    def __iter__(self):
        buffer = torch.empty(1, 3, 8, 8)
        for value in range(4):
            yield buffer.fill_(value)


VARYING = {
    "shuffled": lambda: DataLoader(TensorDataset(torch.randn(16, 3, 8, 8)), batch_size=4, shuffle=True),
    "cropped": lambda: DataLoader(Cropped(), batch_size=2),
    "workers": lambda: DataLoader(Cropped(), batch_size=2, num_workers=1),
    "drawn": Drawn,
    "generator": lambda: (torch.randn(1, 3, 8, 8) for _ in range(4)),
    "one buffer": OneBuffer,
}


@pytest.mark.parametrize("name", VARYING)
def test_every_pass_gives_the_samples_of_the_first(name):
    calls = calls_of(VARYING[name]())
    first = next(iter(calls())).args[0].clone()  # of a pass that is not finished
    passes = [[call.args[0].clone() for call in calls()] for _ in range(2)]
    assert len(passes[0]) == 4
    assert torch.equal(first, passes[0][0])
    assert all(map(torch.equal, *passes))
    assert not torch.equal(passes[0][0], passes[0][1])


def test_a_shuffled_loader_gives_the_integers_of_a_list_in_that_order_and_of_the_same_seed():
    loader = DataLoader(TensorDataset(torch.cat(pictures())), batch_size=2, shuffle=True)
    results = []
    for form in (list, iter, lambda loader: loader, lambda loader: loader):
        torch.manual_seed(3)
        calibrator = Calibrator(small(), QuantConfig(act_method=1, quant_mode=1), form(loader))
        calibrator.run()
        results.append((calibrator.get_quant_params()[0], calibrator.result.report["totals"]))
    assert all(result == results[0] for result in results)


def test_data_too_large_to_keep_are_read_again_and_refused_where_they_differ():
    size = pictures()[0].nbytes
    folder = Folder()
    calls = Passes(folder, limit=size)
    next(iter(calls()))
    for _ in range(3):
        assert all(torch.equal(call.args[0], x) for call, x in zip(calls(), pictures(), strict=True))
    assert folder.read == 3 * len(pictures()) + 2, "only the two samples up to the limit are read once more"


SHUFFLED = {
    "cropped": lambda: DataLoader(Cropped(), batch_size=2),
    "shuffled": lambda: DataLoader(TensorDataset(torch.randn(64, 3, 8, 8)), batch_size=1, shuffle=True),
    "workers that stay": lambda: DataLoader(Cropped(), batch_size=2, num_workers=1, persistent_workers=True),
    "drawn": Drawn,
}


@pytest.mark.parametrize("name", SHUFFLED)
def test_data_too_large_to_keep_that_vary_are_refused_before_a_pass_ends(name):
    torch.manual_seed(0)
    samples = []
    calls = Passes(SHUFFLED[name](), limit=4000)
    refused(lambda: samples.extend(calls()), 4, "calib_data[", "differs from the first pass", "Turn off shuffling")
    assert len(samples) <= 6


def test_the_same_workers_that_stay_give_every_pass_of_large_data():
    data = torch.randn(6, 3, 8, 8)
    loader = DataLoader(TensorDataset(data), batch_size=1, num_workers=1, persistent_workers=True)
    calls = Passes(loader, limit=2 * data[:1].nbytes)
    for _ in range(2):
        assert torch.equal(torch.cat([call.args[0] for call in calls()]), data)


@pytest.mark.parametrize("other", [2, 4])
def test_another_number_of_samples_is_refused(other):
    samples = [pictures()[0]] * 3
    calls = Passes(Growing(samples), limit=1)
    assert len(list(calls())) == 3
    samples[:] = [pictures()[0]] * other
    refused(lambda: list(calls()), 4, f"calib_data[{min(other, 3)}]: differs from the first pass")


class Growing:
    def __init__(self, samples: list[Tensor]) -> None:
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


class Broken(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        raise ValueError("the file\nis damaged")


def test_data_that_cannot_be_read_or_are_empty_are_refused():
    refused(lambda: list(calls_of(DataLoader(Broken()))()), 3, "calib_data[0]: cannot be read (is damaged). Correct")
    refused(lambda: list(calls_of(DataLoader(TensorDataset(torch.zeros(0, 1))))()), 3, "holds no samples")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()


def calibrated(sample, model=None) -> dict:
    calibrator = Calibrator(model or network(), QuantConfig(act_method=1, quant_mode=1), [sample] * 4)
    calibrator.run()
    return calibrator.get_quant_params()[0]


X = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8) / 100


@pytest.mark.parametrize(
    "sample",
    [X, [X], ((X,), {}), [((X,)), {}], ((), {"input": X}), namedtuple("One", "input")(X), BatchFeature({"input": X}),
     X.numpy(), {"input": X.numpy()}, X.clone().requires_grad_() * 1],
)  # fmt: skip
def test_every_form_of_a_sample_is_the_same_call(sample):
    assert calibrated(sample) == calibrated([X])


@pytest.mark.parametrize(
    ("sample", "code", "words"),
    [
        (
            (X, torch.zeros(2)),
            4,
            "calib_data[0] has 2 inputs, but Sequential.forward takes 1 (input). Remove the training targets",
        ),
        (Labelled(X, torch.zeros(2)), 4, "Remove the training targets"),
        ({"input": X, "labels": 1}, 4, "has the input 'labels', which Sequential.forward does not take"),
        ({}, 4, "lacks the input 'input' of Sequential.forward"),
        ({1: X}, 3, "the key 1 is not text"),
        (X.double(), 4, "Input 0 is float64, but the model is float32: give it as float32."),
        ({"input": X.half()}, 4, "Input input is float16"),
        (X.to(torch.uint8), 4, "Input 0 is uint8: preprocess it"),
        (X[0], 4, "The batch axis is missing: give x[None]"),
        ([["a.png"]], 4, "Input 0 is a list: give a tensor"),
        ([[0.1, 0.2]], 4, "Input 0 is a list: give a tensor"),
        (Image.new("RGB", (4, 4)), 3, "holds a PIL picture. Give the tensor"),
        ([Image.new("RGB", (4, 4)), 1], 3, "holds a PIL picture"),
        (X[:, :2], 4, re.compile("layer 0: .*Give calls that this model takes")),
        (X / 0, 6, "Check the data of the calls"),
    ],
)  # fmt: skip
def test_the_error_says_what_is_wrong_with_a_sample(sample, code, words):
    message = refused(lambda: calibrated(sample), code, "calib_data[0]", words)
    assert "Capture" not in message


def test_a_tuple_and_a_dict_that_forward_takes_are_not_args_and_kwargs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, parts, options):
            return self.layer(parts[0]) * options["scale"]

    assert set(calibrated(((torch.ones(2, 4),), {"scale": 2.0}), Two().eval())) == {"layer"}
