"""`octavo doctor` shows what was measured and what was chosen."""

import getpass
import json
import tomllib
from pathlib import Path

import pytest
import torch

from octavo.calibrate.native import kernels
from octavo.calibrate.runtime.attention import CANDIDATES, DTYPES
from octavo.calibrate.runtime.choice import choose_attention, describe, fastest, times_of
from octavo.commands.machine_facts import EXTRAS, advice, facts, missing_kernels, text_of
from octavo.comparing.machine import instruction_sets, processor, surroundings

from ...helpers.commands import octavo

ROOT = Path(__file__).parents[3]


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


def test_facts_say_what_this_machine_has_and_no_paths():
    found = facts()
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["devices"]) == torch.cuda.device_count() + (
        torch.npu.device_count() if hasattr(torch, "npu") else 0
    )
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert found["disk_free"] > 0
    assert set(text_of(found)) == {"versions", "system", "devices", "compiler", "memory", "disk here"}
    text = octavo("doctor", "--json")
    assert str(Path.cwd()) not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert f'"{getpass.getuser()}"' not in text


def test_extras_are_those_of_the_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(declared) - {"dev", "docs"}


def test_advice_follows_from_the_facts():
    found = facts() | {"devices": []}
    quick = {"float32": 1e9, "bfloat16": 2e9}
    idle = list(advice(found, quick, threads=1, cores=4))
    assert [sentence for sentence in idle if "1 of 4 cores" in sentence]
    assert not [sentence for sentence in advice(found, quick, threads=4, cores=4) if "cores" in sentence]
    slow = list(advice(found, {"float32": 2e9, "bfloat16": 1e9}, threads=4, cores=4))
    assert set(slow) - set(advice(found, quick, threads=4, cores=4)) == {
        "bfloat16 is slower than float32 on this processor. Use --dtype float32 where the memory allows it."
    }


def test_without_compiled_kernels_doctor_says_how_to_get_them(monkeypatch):
    assert missing_kernels("cc", switched_off=False).endswith("Install Octavo again.")
    assert "Install a C compiler such as gcc" in missing_kernels(None, switched_off=False)
    monkeypatch.setenv("OCTAVO_KERNELS", "none")
    kernels.library.cache_clear()
    try:
        assert list(advice(facts() | {"devices": []}, {}, 1, 1)) == [missing_kernels("cc", switched_off=True)]
    finally:
        kernels.library.cache_clear()


@pytest.mark.parametrize("columns", [60, 100])
def test_no_name_is_broken_on_a_narrow_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = octavo("doctor")
    assert max(map(len, (line for line in shown.splitlines() if line.startswith(("│", "┃"))))) <= columns
    for word in ("float32", "bfloat16", "integers", "convolution", "choice", "'octavo[opensora]'", "diffusers"):
        assert word in shown
    assert shown.splitlines()[-1] == "Next: octavo capture demo captured --limit 8"
