"""The choice follows from the measured times alone, is made once, and is the same for all."""

import logging
import math
import threading

import pytest
import torch

from octavo.calibrate.runtime import choice
from octavo.calibrate.runtime.attention import ATTENTION, CANDIDATES, DTYPES, Candidate
from octavo.calibrate.runtime.choice import (
    Times,
    attention_for,
    choose_attention,
    describe,
    fastest,
    in_float32,
    measure,
    size_class,
    times_of,
)  # fmt: skip

SIZES = ("small", "medium", "large")


def times_with(**attention):
    """Times whose candidates take `attention` seconds in every size class, underscores for spaces."""
    seconds = {name.replace("_", " "): value for name, value in attention.items()}
    return Times(dict.fromkeys(SIZES, seconds), {})


@pytest.fixture
def fresh(monkeypatch):
    """Forgets what this process measured, until the end of the test."""
    monkeypatch.setattr(choice, "_measured", {})


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"torch": 1.0, "other": 0.5}, "other"),
        ({"torch": 1.0, "other": 0.97}, "torch"),
        ({"torch": 1.0, "other": 1.0, "third": 0.6}, "third"),
        ({"torch": 1.0, "other": math.inf}, "torch"),
        ({"torch": math.inf, "other": 3.0}, "other"),
        ({"torch": math.inf, "other": math.inf}, "torch"),
        ({"torch": 1.0}, "torch"),
    ],
)
def test_the_fastest_is_chosen_and_torch_unless_another_is_clearly_faster(times, chosen):
    assert fastest(times) == chosen


@pytest.mark.parametrize(
    ("times", "word", "chosen"),
    [
        # a processor whose bfloat16 products are fast, and one on which they take twice as long as in float32
        (times_with(torch=68, torch_in_float32=60, oneDNN_products=41, bfloat16_kernel=17), "auto", "bfloat16 kernel"),
        (times_with(torch=90, torch_in_float32=56, oneDNN_products=80, bfloat16_kernel=77), "auto", "torch in float32"),
        (times_with(torch=90, torch_in_float32=56, oneDNN_products=80, bfloat16_kernel=77), "torch", "torch"),
        (times_with(torch=41, oneDNN_products=55), "auto", "torch"),
        (times_with(torch=41, oneDNN_products=27), "float", "oneDNN products"),
    ],
)
def test_attention_is_chosen_by_its_times_among_those_that_the_word_allows(times, word, chosen):
    assert {choose_attention(times, size, word) for size in SIZES} == {chosen}


def test_size_classes_grow_with_the_scores():
    classes = [size_class(2**power) for power in range(30)]
    assert sorted(classes, key=SIZES.index) == classes
    assert set(classes) == set(SIZES)


def test_a_function_that_raises_takes_for_ever():
    def fails():
        raise RuntimeError("no")

    times = measure({"torch": lambda: None, "other": fails})
    assert times["torch"] < math.inf
    assert times["other"] == math.inf
    assert measure({"torch": fails, "other": fails}) == {"torch": math.inf, "other": math.inf}


def test_a_candidate_that_raises_is_not_chosen(fresh, monkeypatch):
    def fails(*_):
        raise RuntimeError("no")

    monkeypatch.setitem(CANDIDATES, "broken", Candidate(fails, lambda dtype: True))
    monkeypatch.setitem(ATTENTION, "auto", (*ATTENTION["auto"], "broken"))
    assert all(attention_for(torch.float32, size, "auto") != "broken" for size in SIZES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_measured_and_logged_once_and_is_the_same_in_all_threads(dtype, fresh, caplog):
    caplog.set_level(logging.INFO)
    found = []
    threads = [threading.Thread(target=lambda: found.append(times_of(dtype))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(times) for times in [*found, times_of(dtype)]}) == 1
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(lines) == 1
    assert lines[0].startswith(describe(dtype, times_of(dtype)))


def test_measuring_needs_nothing_of_its_caller_and_changes_nothing(fresh):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        times = times_of(torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    fitting = {name for name, each in CANDIDATES.items() if each.fits(torch.bfloat16)}
    assert all(set(each) == fitting for each in times.attention.values())
    assert all(each["torch"] < math.inf for each in times.attention.values())


def test_a_word_with_one_candidate_needs_no_measurement(fresh):
    assert attention_for(torch.float32, "small", "torch") == "torch"
    assert not choice._measured


def test_float32_stays_float32():
    assert not any(in_float32(torch.float32, kind) for kind in ("few rows", "many rows", "convolution"))
    assert not in_float32(torch.float64, "few rows")
