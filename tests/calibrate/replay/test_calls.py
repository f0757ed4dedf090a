"""A forward may change its inputs: the samples stay unchanged, and every replay runs on the same values."""

import copy
from collections import OrderedDict
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.onnx.trace import EXPORTERS, trace
from octavo.calibrate.replay.calls import copied_to
from octavo.calibrate.settings import RECIPES, Settings

from ...zoo.toy import Call

CPU = torch.device("cpu")


@dataclass
class Cache:
    """A cache of attention keys that a forward changes."""

    key: Tensor
    calls: list[int] = field(default_factory=list)


class Changing(nn.Module):
    """Changes its inputs if `in_place`, and otherwise a copy of them."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.in_place = nn.Linear(8, 16), nn.Linear(16, 4), in_place

    def forward(self, x: Tensor, parts: list[Tensor], named: dict, cache: Cache, numbers) -> Tensor:
        if not self.in_place:
            x, parts, named, cache, numbers = copy.deepcopy((x, parts, named, cache, numbers))
        x.div_(255).sub_(0.5)
        parts[0].mul_(2)
        x = x + parts.pop() + named.pop("scale")
        cache.calls.append(1)
        cache.key.add_(1)
        numbers += 1
        return self.down(torch.relu(self.up(x + cache.key * len(cache.calls) + torch.from_numpy(numbers) + parts[0])))


def samples() -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    calls = []
    for _ in range(8):
        x, a, b, c, d = torch.rand(5, 3, 8, generator=generator).unbind()
        calls.append(Call((x * 255, [a, b], {"scale": 2.0}, Cache(c), d.numpy()), {}))
    return calls


def written(calls: list[Call]) -> str:
    return repr(
        [[argument.tolist() if isinstance(argument, Tensor) else argument for argument in call.args] for call in calls]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_that_changes_its_inputs_has_the_report_of_one_that_copies_them(recipe):
    reports = []
    for in_place in (False, True):
        inputs = samples()
        result = calibrate(
            Changing(in_place).eval(), lambda inputs=inputs: inputs, Settings(sqnr_calls=8, **RECIPES[recipe])
        )
        assert written(inputs) == written(samples())
        reports.append([result.report[key] for key in ("layers", "totals", "enough")])
    assert reports[0] == reports[1]


@pytest.mark.parametrize("exporter", [pytest.param(EXPORTERS[0], marks=pytest.mark.slow), EXPORTERS[1]])
def test_tracing_leaves_the_example_as_it_was_given(exporter):
    class Detector(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x.div_(255))

    call = Call((torch.full((2, 3), 2.0),), {})
    trace(Detector(), {}, call, exporters=(exporter,))
    assert call.args[0].amax() == 2.0


def test_a_copy_has_the_types_and_the_shared_tensors_of_what_was_given():
    x = torch.randn(4, 3).t()
    module = nn.Linear(2, 2)
    values = (x, OrderedDict(b=x, a=[1, None, "s"]), Cache(x[:1]), module, torch.relu, torch.Size((2, 3)), 1.5)
    copies = copied_to(values, CPU)
    assert [type(value) for value in copies] == [type(value) for value in values]
    assert copies[0] is copies[1]["b"]
    assert torch.equal(copies[0], x)
    assert copies[0].stride() == x.stride()
    assert copies[0].data_ptr() != x.data_ptr()
    assert copies[2].key.data_ptr() != values[2].key.data_ptr()
    assert list(copies[1]) == ["b", "a"]
    assert copies[3] is module
    assert copies[4:] == values[4:]
