"""`octavo doctor` shows what was measured and what was chosen."""

import json

import pytest
import torch

from octavo.calibrate.runtime.attention import CANDIDATES, DTYPES
from octavo.calibrate.runtime.choice import choose_attention, describe, fastest, times_of
from octavo.comparing.machine import instruction_sets, processor, surroundings

from ...helpers.commands import octavo


def test_people_see_the_processor_every_candidate_and_every_dtype(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = octavo("doctor")
    for word in (processor(), "threads", "instruction sets", "compiled kernels", "GFLOPS", "GOPS", "choice"):
        assert word in shown
    for name in (*CANDIDATES, "float32", "bfloat16", "float16", "small", "medium", "large", "convolution"):
        assert name in shown


def test_programs_read_one_object_a_line_with_the_choice_of_this_process():
    events = [json.loads(line) for line in octavo("doctor", "--json").splitlines()]
    by_name = {name: [each for each in events if each["event"] == name] for name in {e["event"] for e in events}}
    assert len(by_name["machine"]) == len(by_name["rates"]) == 1
    assert {"float32", "bfloat16", "int8"} <= set(by_name["rates"][0])
    for dtype in DTYPES:
        name, times = str(dtype).removeprefix("torch."), times_of(dtype)
        attention = {each["size"]: each for each in by_name["attention"] if each["dtype"] == name}
        assert {size: each["choice"] for size, each in attention.items()} == {
            size: choose_attention(times, size) for size in times.attention
        }
        assert all(set(each["seconds"]) == set(times.attention[size]) for size, each in attention.items())
        layers = {each["layer"]: each["choice"] for each in by_name["float_layers"] if each["dtype"] == name}
        assert layers == {kind: fastest(each) for kind, each in times.products.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_page_of_compare_says_what_was_chosen_for_its_dtype(dtype):
    facts = surroundings(torch.device("cpu"), dtype)
    assert facts["chosen kernels"] == describe(dtype, times_of(dtype))


def test_instruction_sets_are_those_that_torch_says():
    sets = instruction_sets()
    assert sets["AVX2"] == torch.cpu._is_avx2_supported()
    assert sets["AVX512"] >= sets["AVX512_BF16"]
