"""A calibration under a budget mixes schemes, keeps the budget and reports it, on a whole tiny pipeline."""

import json
import re

import pytest
import torch

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.export import export
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.schemes import DYNAMIC, TIMESTEP
from octavo.calibrate.mixed_precision.budget import Search
from octavo.calibrate.mixed_precision.sensitivity import divide_layers
from octavo.calibrate.plan import make_plan
from octavo.calibrate.result import Result
from octavo.calibrate.settings import DEFAULTS, Settings
from octavo.capture.recorder import Memory, Recorder
from octavo.pipelines.sd3 import SD3

from ...helpers.commands import capture, errors, octavo
from ...helpers.refusals import refused
from ...zoo.pipelines import make, run

# 48 pipeline runs are enough for three schemes and 16 groups of layers: groups are parts of the tiny model's blocks.
BLOCKS = Search(runs=48)


@pytest.fixture(scope="module")
def tiny():
    pipe, arguments = make("sd3")
    memory = Memory()
    with Recorder(pipe.transformer.requires_grad_(False), memory):
        run(pipe, arguments)
    return pipe, arguments, memory.calls


def result_of(tiny, budget: str, search: Search = BLOCKS, **settings) -> Result:
    pipe, arguments, calls = tiny
    chosen = Settings(defaults=SD3.keep_float, budget=budget, sqnr_calls=1, **settings)
    model = pipe.transformer
    return calibrate(model, lambda: calls, chosen, trajectory=lambda: [run(pipe, arguments)], search=search)


@pytest.fixture(scope="module")
def mixture(tiny) -> Result:
    return result_of(tiny, "60%,0.9x")


def test_the_limit_is_kept_and_the_report_says_what_was_used(tiny, mixture):
    spent, rows = mixture.report["budget"], mixture.report["layers"]
    assert spent["bytes"]["used"] == sum(row["bytes_after"] for row in rows) <= spent["bytes"]["limit"]
    assert spent["bytes"]["float"] == sum(row["bytes_before"] for row in rows)
    assert spent["time"]["used"] <= 0.9
    counts = [row["scheme"] for row in rows if "trajectory_error" in row]
    assert {word: counts.count(word) for word in spent["schemes"]} == spent["schemes"]
    assert counts.count(None) == spent["float"] > 0
    assert all(set(row["trajectory_error"]) == set(DEFAULTS.mixture) for row in rows if "trajectory_error" in row)
    assert all("budget of 60%,0.9x" in row["reason"] for row in rows if "trajectory_error" in row and not row["scheme"])


def test_the_reported_error_is_that_of_the_final_latents(tiny, mixture):
    pipe, arguments, _ = tiny
    exact = run(pipe, arguments)
    with quantized(pipe.transformer, mixture.layers):
        latents = run(pipe, arguments)
    measured = float((latents - exact).double().square().mean())
    assert mixture.report["budget"]["error"]["measured"] == pytest.approx(measured)
    assert torch.equal(run(pipe, arguments), exact)


def test_the_same_mixture_twice(tiny, mixture):
    again = result_of(tiny, "60%,0.9x").report
    assert again["layers"] == mixture.report["layers"]
    assert again["budget"] == mixture.report["budget"]


def test_a_mixture_is_written_and_read_with_the_same_integers(tiny, tmp_path):
    mixed = result_of(tiny, "50%,0.85x", smoothing=True, groups=SD3.groups)
    export(mixed, tiny[0].transformer, tmp_path / "out")
    read = load_ascend(tmp_path / "out")
    assert {name: layer.scheme for name, layer in read.items()} == {n: x.scheme for n, x in mixed.layers.items()}
    assert len({layer.scheme for layer in read.values()}) > 1
    for name, layer in mixed.layers.items():
        other = read[name].state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in layer.state_dict().items())
        assert layer.scheme != "W8A16" or layer.mul_scale is None
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["settings"]["budget"] == written["budget"]["budget"] == "50%,0.85x"


def test_ranges_by_noise_level_may_be_mixed_too(tiny):
    mixed = result_of(tiny, "0.8x", Search(schemes=(TIMESTEP, DYNAMIC), runs=4), activations="timestep")
    assert set(mixed.report["budget"]["schemes"]) == {"W8A8_TIMESTEP", "W8A8_DYNAMIC"}
    assert mixed.report["budget"]["time"]["used"] <= 0.8
    assert {layer.scheme for layer in mixed.layers.values()} <= {"W8A8_TIMESTEP", "W8A8_DYNAMIC"}


def test_a_budget_that_cannot_be_kept_says_what_could_be(tiny):
    message = refused(
        lambda: result_of(tiny, "20%"), 2, re.compile(r"^budget '20%': the layers take at least .*KiB \((.*)%\)")
    )
    smallest = message.split("(")[1].split(")")[0]
    assert result_of(tiny, smallest).report["budget"]["float"] == 0
    refused(lambda: result_of(tiny, "0.1x"), 2, re.compile(r"^budget '0.1x': the layers take at least 0\.\d+x"))


def test_a_budget_for_everything_in_float_is_refused(tiny):
    refused(lambda: result_of(tiny, "1GiB"), 2, "this budget is large enough for all layers in float")


def test_a_budget_needs_the_pipeline(tiny):
    refused(
        lambda: calibrate(tiny[0].transformer, lambda: tiny[2], Settings(budget="50%")),
        2,
        re.compile(r"^budget: needs a function that runs the pipeline"),
    )


def test_a_pipeline_that_does_not_run_the_model_is_refused(tiny):
    refused(
        lambda: calibrate(
            tiny[0].transformer, lambda: tiny[2], Settings(budget="50%"), trajectory=lambda: [torch.zeros(3)]
        ),
        4,
        "calls no layer of this model",
    )


def test_layers_are_grouped_until_the_runs_suffice(tiny):
    names = make_plan(tiny[0].transformer, defaults=SD3.keep_float).quantized
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    sizes = [len(divide_layers(names, blocks, most)) for most in (1000, 20, 2, 1)]
    assert sizes[0] == len(names) > sizes[1] > sizes[2] == sizes[3] == 2
    for most in (1000, 20, 2):
        assert sorted(name for group in divide_layers(names, blocks, most) for name in group) == sorted(names)


def test_the_command_reports_its_runs_and_its_result(tiny_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle")
    capture(tiny_model, tmp_path / "capture", tmp_path / "prompts.txt")
    few = ("--keep-float", "*.norm*", "--keep-float", "transformer_blocks.0", "--device", "cpu")
    output = octavo("calibrate", tmp_path / "capture", tmp_path / "out", "--budget", "90%", *few)
    assert "runs of 1 prompt in 3 steps, about" in output
    assert "Budget 90%: " in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["budget"]["bytes"]["used"] <= report["budget"]["bytes"]["limit"]
    output = octavo("calibrate", tmp_path / "capture", tmp_path / "b", "--budget", "5", *few, code=2)
    assert len(errors(output)) == 1
    assert "has no unit" in errors(output)[0]
    assert not (tmp_path / "b").exists()
