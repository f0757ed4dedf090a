"""Checks that several ranks write the same files as one process, and that they end together."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from octavo.calibrate.formats.manifest import MANIFEST
from octavo.calibrate.observers.patches import PatchSurvey
from octavo.calibrate.observers.survey import Survey, survey_of
from octavo.calibrate.observers.survey_replay import SurveyState, merge_ranks
from octavo.calibrate.replay.current_call import CurrentCall
from octavo.calibrate.settings import RECIPES
from octavo.capture import ranks as module
from octavo.capture.ranks import ALONE, Ranks, ranks_of_environment
from octavo.capture.store.reader import Capture

from ..helpers.commands import capture, errors, octavo
from ..helpers.ranked import RankResult, RunningRanks, printing, ranked
from ..zoo.hard_sd3 import bits, calibrated, hard, prompts, same
from ..zoo.toy import toy

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "ring", "cross", "square")]
GONE = "of this run has ended or lost its connection. Run again; add --resume for a capture."
CASES: dict[str, dict[str, Any]] = {
    **RECIPES,
    "sigma": {"observer": "sigma", "sqnr_calls": 5},
    "percentile": {"observer": "percentile"},
    "mse": {"observer": "mse", "smoothing": True},
    "timestep": {"activations": "timestep", "smoothing": True},
    "fallback": {"fallback": 3},
    "weight-only": {"activations": "float", "weights": ("adaround",)},
}

QUICK = (("plain", 3), ("balanced", 2), ("sigma", 2), ("percentile", 3))
slow = partial(pytest.param, marks=pytest.mark.slow)  # makes a case that only `make test-all` runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture(scope="module")
def captured_alone(tiny_model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured")
    capture(tiny_model, folder / "capture", texts)
    return folder / "capture"


def capture_arguments(model: Path, out: Path, texts: Path, *more: object) -> list[object]:
    """Returns the arguments of a capture in three steps of 16 x 16 pixels."""
    small = ("--steps", 3, "--height", 16, "--width", 16, "--device", "cpu")
    return ["capture", model, out, "--prompts", texts, *small, *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file, without the time and memory in a report."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    if "report.json" in files:
        report = json.loads(files["report.json"])
        del report["seconds"], report["peak_memory"]
        files["report.json"] = json.dumps(report).encode()
        del files[MANIFEST]  # holds the digest of the report
    return files


def codes(ended: list[RankResult]) -> list[int]:
    return [rank.code for rank in ended]


def error_lines(ended: list[RankResult]) -> list[str]:
    """Returns the lines about errors and interruptions, of all ranks."""
    lines = [line for rank in ended for line in rank.output.splitlines()]
    assert not [line for line in lines if "Traceback" in line], lines
    return [line for line in lines if line.startswith(("Error", "Interrupted"))]


@pytest.mark.parametrize("world", [2, slow(3)])
def test_several_ranks_store_and_write_what_one_process_does(tiny_model, texts, captured_alone, tmp_path, world):
    ended = ranked(
        world, tmp_path, *capture_arguments(tiny_model, tmp_path / "capture", texts, "--pth", tmp_path / "calls.pth")
    )
    assert codes(ended) == [0] * world, ended
    assert contents(tmp_path / "capture") == contents(captured_alone)
    assert "8 prompts, 24 calls" in ended[0].output
    assert not any(rank.output for rank in ended[1:])
    options = ("--samples", 11, "--device", "cpu", "--accuracy", "balanced")
    octavo("calibrate", captured_alone, tmp_path / "one", *options)
    ended = ranked(world, tmp_path, "calibrate", captured_alone, tmp_path / "several", *options)
    assert codes(ended) == [0] * world, ended
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    assert not any(rank.output for rank in ended[1:])


@pytest.mark.parametrize("world", [2, slow(3)])
@pytest.mark.parametrize(
    "options",
    [slow(("--samples", "11", "--accuracy", "balanced")), (), slow(("--activations", "timestep")),
     slow(("--no-smoothing", "--activations", "dynamic")), slow(("--observer", "mse", "--weights", "gptq"))],
    ids=" ".join,
)  # fmt: skip
def test_blocks_of_several_ranks_are_those_of_one(captured_alone, tmp_path, world, options):
    options = ("--device", "cpu", "--memory", "1024GiB", *options)
    octavo("calibrate", captured_alone, tmp_path / "one", *options)
    ended = ranked(world, tmp_path, "calibrate", captured_alone, tmp_path / "several", *options)
    assert codes(ended) == [0] * world, ended
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    assert not any(rank.output for rank in ended[1:])
    assert not list(tmp_path.glob(".*"))  # no rank left temporary files


def each_rank(world: int, folder: Path, work: Callable[[Ranks], Any]) -> list[Any]:
    """Returns the result of `work` in each rank."""

    def connected(rank: int) -> None:
        ranks = ranks_of_environment()
        ranks.connect("cpu")
        torch.save(work(ranks), folder / f"rank-{rank}")
        ranks.close()

    ended = RunningRanks(world, folder, connected).end()
    assert codes(ended) == [0] * world, ended
    return [torch.load(folder / f"rank-{rank}") for rank in range(world)]


def outcome(calls: list[Any], settings: dict[str, Any], ranks: Ranks) -> tuple[Any, dict[str, torch.Tensor], int]:
    """Returns the report of a calibration, the tensors of its layers, and how often this process ran the model."""
    model, runs = hard(), 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    model.register_forward_pre_hook(count)
    result = calibrated(model, calls, ranks=ranks, **settings)
    report = {name: value for name, value in result.report.items() if name not in ("seconds", "peak_memory")}
    return report, bits(result.layers), runs


@pytest.mark.parametrize(("case", "world"), [(c, w) if (c, w) in QUICK else slow(c, w) for c in CASES for w in (2, 3)])
def test_every_calibration_of_several_ranks_is_the_same_bits(tmp_path, case, world):
    calls, settings = prompts(9, 5), {"sqnr_calls": 1, **CASES[case]}
    results = each_rank(world, tmp_path, lambda ranks: outcome(calls, settings, ranks))
    report, tensors, runs = outcome(calls, settings, ALONE)
    assert bool(report["enough"]) == (case in ("plain", "fast", "balanced", "best", "percentile"))
    for other, theirs, _ in results:
        assert other == report
        assert same(theirs, tensors)
    # Each rank runs the first call once, to find what reads weights. With weight rounding, each rank also replays calls
    # for the sums of its own layers. All other runs are made once.
    shared = sum(its for _, _, its in results) - (world - 1)
    assert shared == runs if not settings.get("weights") else runs < shared < world * runs


@pytest.mark.parametrize("case", ["balanced", slow("percentile"), slow("timestep")])
def test_there_may_be_more_ranks_than_calls(tmp_path, case):
    calls = prompts(1, 2)
    report, tensors, _ = outcome(calls, CASES[case], ALONE)
    for other, theirs, _ in each_rank(3, tmp_path, lambda ranks: outcome(calls, CASES[case], ranks)):
        assert other == report
        assert same(theirs, tensors)


@pytest.mark.parametrize("world", [2, 3])
def test_a_survey_of_more_rows_than_it_keeps_is_the_same_however_calls_are_shared(tmp_path, world):
    """The layers run in every call, in some calls, several times in a call, and on the input of another layer."""

    def survey_inputs(ranks: Ranks) -> dict[str, Any]:
        current = CurrentCall(toy(), ranks)
        surveys = {name: Survey(current, name) for name in ("all", "odd", "often", "like-all")}
        surveys["patches"] = PatchSurvey(current, "patches", nn.Conv2d(2, 3, 3))
        for index in range(ranks.rank, 600, ranks.world):
            current.position, current.held_out, current.level = index, index % 4 == 3, float(index)
            current.samples, current.units = current.samples + 1, [index % 9 for index in range(600)]
            x = torch.randn(9, 5, generator=torch.Generator().manual_seed(index))
            reading = survey_of(x)
            surveys["patches"].add(surveys["patches"].read(x[:, :, None].expand(-1, -1, 5)[:2]))
            surveys["all"].add(reading)
            surveys["like-all"].add(reading if index != 77 else survey_of(x + 1))
            if index % 2:
                surveys["odd"].add(survey_of(-x))
            for again in range(index % 5):
                surveys["often"].add(survey_of(x * again))
        merged = merge_ranks(SurveyState(current, surveys), ranks).surveys
        return {
            name: (
                survey.train.rows, survey.all.low, tuple(survey.all.without(4)), survey.leader, survey.has_tokens,
                *((sample.rows, sample.levels) for sample in survey.samples),
            )
            for name, survey in merged.items()
        }  # fmt: skip

    expected = survey_inputs(ALONE)
    assert all(256 <= len(rows) <= 512 for summary in expected.values() for rows, _ in summary[-2:])
    assert expected["all"][3] == "all"
    assert expected["like-all"][3] == "like-all"
    for result in each_rank(world, tmp_path, survey_inputs):
        assert str(result) == str(expected)
        for name, summary in expected.items():
            for mine, theirs in zip(summary[-2:], result[name][-2:], strict=True):
                assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize(
    ("device", "placed"),
    [("cpu", "cpu"), ("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("npu", "npu:3"), ("nonsense", "nonsense")],
)
def test_the_number_of_a_rank_on_its_machine_picks_the_card_where_none_is_named(device, placed):
    assert module._device_and_backend(device, 3)[0] == placed
    assert ALONE.connect(device) == device


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"RANK": "x", "WORLD_SIZE": "8"}, (0, 1, 0)),
    ],
)
def test_the_environment_says_which_rank_this_is(monkeypatch, variables, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ranks = ranks_of_environment()
    assert (ranks.rank, ranks.world, ranks.local) == expected
    assert ranks.share(list(range(20))) == [index for index in range(20) if ranks.owns(index)]


def at_call(number: int, rank: int, action: Callable[[], None]) -> Callable[[int], Any]:
    """Returns a function that makes a rank run `action` in the call of its transformer with this number, from 1."""
    from diffusers import SD3Transformer2DModel

    def before(mine: int) -> None:
        module.BEAT, module.PATIENCE, module.LINGER = 0.1, 3.0, 0.5
        count = 0

        def hook(called: torch.nn.Module, args: object) -> None:
            nonlocal count
            count += isinstance(called, SD3Transformer2DModel)
            if count == number and isinstance(called, SD3Transformer2DModel) and mine == rank:
                action()

        register_module_forward_pre_hook(hook)

    return before


def broken() -> None:
    raise RuntimeError("broken. Really")


def test_an_error_of_one_rank_is_printed_once_and_ends_all(tiny_model, texts, captured_alone, tmp_path):
    arguments = capture_arguments(tiny_model, tmp_path / "capture", texts)
    ended = ranked(2, tmp_path, *arguments, before=at_call(5, 1, broken))  # rank 1 has prompts 2 and 4; call 5 is in 4
    assert codes(ended) == [1, 1]
    (line,) = error_lines(ended)
    assert line.startswith("Error: rank 1: prompt 4: RuntimeError: broken. Change the settings")
    there = Capture.open(tmp_path / "capture", allow_incomplete=True).units
    assert "a blue circle" not in [unit.info["prompt"] for unit in there if unit.index == 3]
    octavo(*arguments, "--resume")
    assert contents(tmp_path / "capture") == contents(captured_alone)
    ended = ranked(3, tmp_path, "calibrate", captured_alone, tmp_path / "out", before=at_call(3, 2, broken))
    assert codes(ended) == [4, 4, 4]
    assert len(error_lines(ended)) == 1
    assert error_lines(ended)[0].startswith("Error: rank 2: prompt 2, step 2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--device", "npu"), 7, "torch_npu is not installed"),
        (("--prompts", "nowhere.txt"), 2, "no such prompts file"),
        (("--arg", "nonsense=1"), 2, "takes no argument nonsense"),
    ],
)
def test_an_error_of_all_ranks_is_printed_once(tiny_model, texts, tmp_path, more, code, words):
    ended = ranked(2, tmp_path, *capture_arguments(tiny_model, tmp_path / "capture", texts, *more))
    assert codes(ended) == [code, code]
    (line,) = error_lines(ended)
    assert words in line


def test_a_rank_that_does_not_see_the_directory_of_the_first_says_so(tiny_model, texts, tmp_path):
    def elsewhere(rank: int) -> None:
        (tmp_path / str(rank)).mkdir()
        os.chdir(tmp_path / str(rank))

    ended = ranked(2, tmp_path, *capture_arguments(tiny_model, Path("capture"), texts), before=elsewhere)
    assert codes(ended) == [5, 5]
    (line,) = error_lines(ended)
    assert line.endswith("Use a directory that all machines share.")


def test_prompts_that_fail_are_left_out_by_whichever_rank_has_them(tiny_model, texts, tmp_path):
    arguments = capture_arguments(tiny_model, tmp_path / "capture", texts, "--keep-going")
    ended = ranked(2, tmp_path, *arguments, before=at_call(4, 1, broken))
    assert codes(ended) == [1, 1]
    assert "Warning: prompt 4: RuntimeError: broken" in ended[1].output
    assert "1 prompt failed" in error_lines(ended)[0]
    assert len(Capture.open(tmp_path / "capture", allow_incomplete=True).units) == 7


@pytest.mark.parametrize("dead", [slow(0), 1])
def test_a_rank_that_dies_ends_the_others_and_leaves_what_resumes(tiny_model, texts, captured_alone, tmp_path, dead):
    arguments = capture_arguments(tiny_model, tmp_path / "capture", texts)
    ended = ranked(2, tmp_path, *arguments, before=at_call(5, dead, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert codes(ended) == ([-9, 7] if dead == 0 else [7, -9])
    assert len(error_lines(ended)) == 1
    assert GONE in error_lines(ended)[0]
    units = Capture.open(tmp_path / "capture", allow_incomplete=True).units
    assert 1 <= len(units) < 8
    ended = ranked(3, tmp_path, *arguments, "--resume")
    assert codes(ended) == [0, 0, 0], ended
    assert contents(tmp_path / "capture") == contents(captured_alone)


@pytest.mark.slow
def test_a_rank_that_dies_ends_a_calibration(captured_alone, tmp_path):
    arguments = ("calibrate", captured_alone, tmp_path / "out")
    ended = ranked(2, tmp_path, *arguments, before=at_call(5, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert codes(ended) == [7, -9]
    assert error_lines(ended) == [f"Error: rank 0: rank 1 {GONE}"]


@pytest.mark.parametrize("number", [signal.SIGINT, slow(signal.SIGTERM)])
def test_a_signal_to_all_ranks_is_printed_once_and_a_launcher_may_pass_it_on(
    tiny_model, texts, captured_alone, tmp_path, number
):
    many = tmp_path / "many.txt"
    many.write_text("\n".join(f"{text} {index}" for index in range(100) for text in PROMPTS))
    out = tmp_path / "capture"
    run = RunningRanks(2, tmp_path, lambda rank: printing(*capture_arguments(tiny_model, out, many, "--json")))
    while not all('"event": "prompt"' in file.read_text() for file in run.files if file.exists()) or not out.exists():
        if any(os.waitpid(pid, os.WNOHANG)[0] for pid in run.pids):
            pytest.fail(str([file.read_text() for file in run.files]))
    for _ in range(2):
        for pid in run.pids:
            os.kill(pid, number)
    ended = run.end()
    assert codes(ended) == [128 + number] * 2
    (line,) = error_lines(ended)
    stored, words = int(line.split()[1]), line.split(maxsplit=2)[2]
    assert words == "of 800 prompts are stored. Run again with --resume."
    assert 0 <= len(list((out / "units").glob("0*"))) - stored <= 1  # the other rank may be renaming its last unit
    assert not list(out.rglob(".*"))


@pytest.mark.slow
def test_runs_under_a_budget_are_shared(tiny_model, captured_alone, tmp_path):
    options = ("calibrate", captured_alone, "--budget", "60%", "--device", "cpu")
    octavo(*options, tmp_path / "one")
    ended = ranked(2, tmp_path, *options, tmp_path / "several")
    assert codes(ended) == [0, 0], ended
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
    ],
    ids=("torchrun", "accelerate"),
)
def test_torchrun_and_accelerate_start_the_ranks(tiny_model, texts, captured_alone, tmp_path, launcher):
    command = [sys.executable, "-m", *launcher, "-m", "octavo"]

    def launched(*arguments: object, code: int = 0) -> str:
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    output = launched(*capture_arguments(tiny_model, tmp_path / "capture", texts))
    assert output.count("8 prompts, 24 calls") == 1
    assert contents(tmp_path / "capture") == contents(captured_alone)
    output = launched("calibrate", captured_alone, tmp_path / "several")
    assert output.count("layers in 8-bit integers") == 1
    octavo("calibrate", captured_alone, tmp_path / "one")
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    output = launched("calibrate", captured_alone, tmp_path / "out", "--keep-float", "nothing", code=1)
    assert len(errors(output)) == 1
    assert "nothing" in errors(output)[0]
