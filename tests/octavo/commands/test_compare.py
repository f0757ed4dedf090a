"""Checks the numbers, gates and refusals of `octavo compare` on a tiny pipeline."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from octavo.calibrate.formats.manifest import MANIFEST
from octavo.calibrate.replay.calls import evenly_spaced
from octavo.calibrate.replay.sqnr import Power
from octavo.capture.recorder import Memory, Recorder
from octavo.checkpoints import Deployed, load_deployed
from octavo.comparing.comparison import Comparison
from octavo.comparing.machine import surroundings
from octavo.comparing.perceptual import can_measure_lpips
from octavo.comparing.probe import SAMPLED
from octavo.comparing.side import sizes
from octavo.page import page
from octavo.pipelines.load import load_pipeline
from octavo.pipelines.run import RunSettings, call_arguments, run_prompt
from octavo.pipelines.sd3 import SD3

from ...helpers.commands import errors, octavo
from ...zoo.opensora import tiny_pipeline

CPU = torch.device("cpu")
SMALL = ("--steps", 3, "--height", 16, "--width", 16, "--device", "cpu")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text('a red circle\na <blue> "ring"')
    return file


@pytest.fixture(scope="module")
def quantized(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint()


def compared(tiny_model: Path, out: Path, layers: bool = True) -> Comparison:
    """Compares the float and the quantized model on one prompt; without `layers`, the float model with itself."""
    pipe = load_pipeline(tiny_model)
    deployed = load_deployed(pipe, out, None, CPU) if layers else Deployed.itself(pipe, "transformer")
    comparison = Comparison(pipe, [deployed], call_arguments(pipe, SD3, RunSettings(None, 3, 16, 16)), 0)
    comparison.probe_denoiser("a red circle")
    comparison.compare("a red circle")
    return comparison


def lines(output: str) -> dict[str, dict[str, Any]]:
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]  # warnings are not JSON
    return {event["event"]: event for event in events if event["event"] != "prompt"}


def test_the_page_and_the_lines_hold_every_prompt(tiny_model, quantized, prompts, tmp_path):
    file = tmp_path / "report.html"
    output = octavo("compare", tiny_model, quantized, "--prompts", prompts, *SMALL, "-o", file, "--json")
    events, text = lines(output), file.read_text()
    rows = [json.loads(line) for line in output.splitlines() if '"event": "prompt"' in line]
    assert [row["prompt"] for row in rows] == ["a red circle", 'a <blue> "ring"']
    assert all(len(row["latent_error"]) == 3 and 10 < row["psnr"] < 90 and row["output_sqnr"] > 15 for row in rows)
    # two in the viewer, two for each pair, two in the heat map
    assert text.count("data:image/png;base64,") == 2 + 2 * len(rows) + 2
    assert "a &lt;blue&gt; &#34;ring&#34;" in text
    assert "<blue>" not in text
    done, report = events["done"], json.loads((quantized / "report.json").read_text())
    assert done["totals"]["output_sqnr"] == pytest.approx(report["totals"]["output_sqnr"], abs=5)
    assert done["totals"]["size"]["quantized"] < done["totals"]["size"]["float"]
    assert events["layers"]["layers"] == report["layers"]
    assert all(row["name"].replace(".", ".<wbr>") in text for row in report["layers"] if row["scheme"] is None)
    assert events["ranges"]["steps"] == [1, 2, 3]
    assert "://" not in text.replace("http://www.w3.org/", "")
    assert file.stat().st_mode & 0o777 == 0o600
    assert f"torch {torch.__version__}" in text
    assert f"{torch.get_num_threads()} threads" in text
    # one for each thumbnail, one for the viewer
    assert text.count(">float</span>") == text.count(">int8</span>") == len(rows) + 1


def test_sizes_are_those_of_the_dtype_in_which_the_model_is_stored(tiny_model, quantized):
    pipe = load_pipeline(tiny_model)
    deployed, run = load_deployed(pipe, quantized, None, CPU), call_arguments(pipe, SD3, RunSettings(None, 3, 16, 16))
    whole, half = (Comparison(pipe, [deployed], run, 0, dtype).sides[0].sizes for dtype in (None, torch.float16))
    assert (
        whole["float"]
        == 2 * half["float"]
        == sum(4 * tensor.numel() for tensor in pipe.transformer.state_dict().values())
    )
    assert half["quantized"] < whole["quantized"] < whole["float"]


def test_a_code_in_fp8_counts_with_one_byte_as_in_int8(tiny_model, checkpoint):
    pipe, bytes_ = load_pipeline(tiny_model), {}
    for element in ("int8", "fp8"):
        out = checkpoint("--format", "diffusers", "--accuracy", "plain", "--element", element)
        deployed = load_deployed(pipe, out, None, CPU)
        bytes_[element] = sizes(deployed, torch.float16)["quantized"]
    assert bytes_["fp8"] <= bytes_["int8"]  # which also stores zero points and corrections


def test_a_model_does_not_differ_from_itself(tiny_model, quantized):
    comparison = compared(tiny_model, quantized, layers=False)
    totals, row = comparison.totals(), comparison.sides[0].pairs[0].row
    assert (totals["psnr"], totals["output_sqnr"], totals["output_same"]) == (None, None, True)
    assert row["latent_error"] == [0.0] * 3
    assert row["mean_square"] == 0.0
    assert totals["size"]["quantized"] == totals["size"]["float"]


def test_the_same_content_makes_the_same_page(tiny_model, quantized):
    comparison = compared(tiny_model, quantized)
    pictures = [(pair.exact, pair.other) for pair in comparison.sides[0].pairs]
    content = {
        "note": "", "model": "m", "checkpoint": "c", "component": "transformer", "pipeline": "P", "runs_on": "cpu",
        "prompts_source": "s", "settings": {}, "decoded": True, "totals": comparison.totals(), "gates": [],
        "prompts": [pair.row for pair in comparison.sides[0].pairs], "ranges": comparison.probe.heat(),
        "report": comparison.sides[0].deployed.report, "surroundings": surroundings(CPU, comparison.dtype),
    }  # fmt: skip
    assert page([content], pictures) == page([json.loads(json.dumps(content))], pictures)


def test_the_probe_reads_the_inputs_that_run_and_leaves_no_hook(tiny_model, quantized):
    comparison = compared(tiny_model, quantized)
    model = comparison.sides[0].deployed.module
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    memory, maxima = Memory(), {}
    with Recorder(model, memory, clock=comparison.probe.clock.__class__()) as recorder:
        run_prompt(comparison.pipe, "a red circle", comparison.arguments, 0, recorder.clock.tick)
    name = "transformer_blocks.1.ff.net.0.proj"
    layer = model.get_submodule(name)
    with torch.no_grad():
        for call in memory.calls:
            hook = layer.register_forward_pre_hook(
                lambda _, args, step=call.step: maxima.setdefault(step, []).append(float(args[0].abs().max()))
            )
            model(**call.kwargs)
            hook.remove()
    heat = comparison.probe.heat()
    assert len(heat["layers"]) == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
    assert heat["maximum"][heat["layers"].index(name)] == [max(maxima[step]) for step in range(3)]


def test_the_output_sqnr_is_that_of_all_prompts(tiny_model, quantized):
    prompts, power = ("a red circle", "a small blue ring", ""), Power()
    pipe = load_pipeline(tiny_model)
    deployed = load_deployed(pipe, quantized, None, CPU)
    comparison = Comparison(pipe, [deployed], call_arguments(pipe, SD3, RunSettings(None, SAMPLED + 2, 16, 16)), 0)
    comparison.probe_denoiser(prompts[0])
    for prompt in prompts:
        comparison.compare(prompt)
        memory = Memory()
        with Recorder(deployed.module, memory) as recorder:
            run_prompt(pipe, prompt, comparison.arguments, 0, recorder.clock.tick)
        for index in evenly_spaced(SAMPLED + 2, SAMPLED):
            call = memory.calls[index]
            with torch.no_grad():
                exact = deployed.module(**call.kwargs)[0]
                with deployed.installed() as integers:
                    power.add(exact, integers(**call.kwargs)[0])
    rows = [pair.row["output_sqnr"] for pair in comparison.sides[0].pairs]
    assert len(set(rows)) == 3
    assert comparison.totals()["output_sqnr"] == pytest.approx(power.sqnr, rel=1e-6)
    assert min(rows) < comparison.totals()["output_sqnr"] < max(rows)


@pytest.mark.parametrize(
    ("gate", "code"), [(("--min-psnr", 5), 0), (("--min-psnr", 99), 1), (("--min-sqnr", 5), 0), (("--min-sqnr", 99), 1)]
)
def test_a_gate_that_is_missed_ends_with_one_line_and_the_page_is_there(tiny_model, quantized, tmp_path, gate, code):
    file = tmp_path / "report.html"
    options = ("--prompts", "demo", "--limit", 1, *SMALL, "-o", file)
    output = octavo("compare", tiny_model, quantized, *options, *gate, code=code)
    assert len(errors(output)) == code
    assert ("Missed: " in file.read_text()) == bool(code)
    assert ("limit at least 99.0 dB" in output) == bool(code)


def test_several_checkpoints_are_compared_as_each_alone(tiny_model, checkpoint, quantized, prompts, tmp_path):
    outs, file = (quantized, checkpoint("--activations", "timestep")), tmp_path / "report.html"
    command = ("compare", tiny_model, *outs, "--prompts", prompts, "--seeds", 2, *SMALL, "-o", file, "--json")
    output = octavo(*command, "--min-sqnr", 5, "--gate-by", "best")
    rows = [json.loads(line) for line in output.splitlines() if '"event": "prompt"' in line]
    done = lines(output)["done"]
    assert [row["checkpoint"] for row in rows] == [str(out) for out in outs] * 4
    assert len({row["seed"] for row in rows}) == 4
    assert [part["checkpoint"] for part in done["checkpoints"]] == [str(out) for out in outs]
    for part in done["checkpoints"]:
        low, high = part["totals"]["intervals"]["output_sqnr"]
        assert low < part["totals"]["output_sqnr"] < high
        assert [(gate["key"], gate["passed"], gate["by"]) for gate in part["gates"]] == [("output_sqnr", True, "best")]
    # float and two checkpoints of four pairs, two in the viewer, two in the heat map
    assert file.read_text().count("data:image/png;base64,") == 3 * 4 + 2 + 2
    alone = compared(tiny_model, outs[1]).totals()
    pipe = load_pipeline(tiny_model)
    deployed = [load_deployed(pipe, out, None, CPU) for out in outs]
    both = Comparison(pipe, deployed, call_arguments(pipe, SD3, RunSettings(None, 3, 16, 16)), 0)
    both.probe_denoiser("a red circle")
    both.compare("a red circle")
    for key in ("psnr", "ssim", "output_sqnr", "latent_error", "step_sqnr"):
        assert both.totals(1)[key] == alone[key] != both.totals(0)[key]


def test_the_page_of_one_pair_says_that_there_is_no_interval(tiny_model, quantized):
    comparison = compared(tiny_model, quantized)
    assert set(comparison.totals()["intervals"].values()) == {None}
    assert comparison.sides[0].samples == 1


def test_ranges_by_noise_level_and_a_checkpoint_without_its_report(tiny_model, checkpoint, prompts, tmp_path):
    shutil.copytree(checkpoint("--activations", "timestep"), tmp_path / "out")
    (tmp_path / "out" / "report.json").unlink()
    (tmp_path / "out" / MANIFEST).unlink()
    options = ("--prompts", prompts, *SMALL, "-o", tmp_path / "report.html")
    events = lines(octavo("compare", tiny_model, tmp_path / "out", *options, "--json"))
    assert events["done"]["totals"]["output_sqnr"] > 15
    assert events["layers"]["layers"] == []
    assert "exists. Use --overwrite" in octavo("compare", tiny_model, tmp_path / "out", *options, code=5)


def test_a_view_that_diffusers_loads_draws_as_the_layers_do(tiny_model, checkpoint, quantized, prompts, tmp_path):
    shutil.copytree(checkpoint("--format", "diffusers"), tmp_path / "view")
    options = ("--prompts", prompts, *SMALL, "--json")
    by = {
        out: lines(octavo("compare", tiny_model, out, *options, "-o", tmp_path / f"{out.name}.html"))["done"]["totals"]
        for out in (quantized, tmp_path / "view")
    }
    layers, view = by[quantized], by[tmp_path / "view"]
    assert view["output_sqnr"] == pytest.approx(layers["output_sqnr"], abs=1)
    assert view["size"]["float"] == layers["size"]["float"]
    assert view["size"]["quantized"] < view["size"]["float"]
    pipe = load_pipeline(tiny_model)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(1)
    pipe.save_pretrained(tmp_path / "other")
    command = ("compare", tmp_path / "other", tmp_path / "view", *options, "-o", tmp_path / "no.html")
    assert "was made from other weights of this model (fingerprint " in octavo(*command, code=4)
    (tmp_path / "view" / MANIFEST).unlink()
    assert "no float parameter has" in octavo(*command, code=4)


def broken(tiny_model: Path, tmp_path: Path) -> Path:
    """Copies the model without its weights. compare recognizes the copy but cannot load it, so every other refusal
    comes before loading."""
    shutil.copytree(tiny_model, tmp_path / "broken")
    for file in (tmp_path / "broken" / "transformer").glob("*.safetensors"):
        file.unlink()
    return tmp_path / "broken"


def test_what_cannot_be_done_is_said_before_the_model_is_loaded(tiny_model, quantized, prompts, tmp_path):
    model, common = broken(tiny_model, tmp_path), ("--prompts", prompts, *SMALL)
    for out, file, code, words in (
        (quantized, tmp_path / "nowhere" / "report.html", 5, "no such directory"),
        (quantized, tmp_path, 5, "is a directory"),
        (tmp_path / "missing", tmp_path / "report.html", 2, "no such directory"),
        (prompts.parent, tmp_path / "report.html", 3, "no ascend checkpoint"),
        (tiny_model, tmp_path / "report.html", 2, "is a pipeline without a quantized model. Give MODEL first"),
        ((quantized, quantized), tmp_path / "report.html", 2, "a checkpoint is given twice"),
        ((quantized, "--min-judged", 0.5), tmp_path / "report.html", 2, "only prompts of the bundled model demo"),
        *([] if can_measure_lpips() else [((quantized, "--preset", "videos"), tmp_path / "r.html", 2, "pip install")]),
    ):
        output = octavo("compare", model, *(out if isinstance(out, tuple) else (out,)), *common, "-o", file, code=code)
        assert words in output
        assert len(errors(output)) == 1
    assert not (tmp_path / "report.html").exists()


def test_a_checkpoint_of_another_model_is_refused(tiny_model, quantized, prompts, tmp_path):
    common = ("--prompts", prompts, "-o", tmp_path / "report.html")
    assert "was made from another model (transformer: " in octavo("compare", "demo", quantized, *common, code=4)
    pipe = load_pipeline(tiny_model)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(2)
    pipe.save_pretrained(tmp_path / "other")
    output = octavo("compare", tmp_path / "other", quantized, *common, code=4)
    assert "was made from other weights of this model (fingerprint " in output
    assert len(errors(output)) == 1
    bare = shutil.copytree(quantized, tmp_path / "bare")
    (bare / MANIFEST).unlink()
    assert "proj_out.weight has other values" in octavo("compare", tmp_path / "other", bare, *common, code=4)


def test_latents_of_a_video_without_a_decoder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a wave rolls in")
    video = ("--prompts", tmp_path / "prompts.txt", "--height", 40, "--width", 50, "--frames", 17, "--steps", 2)
    octavo("capture", tmp_path / "model", tmp_path / "captured", *video)
    octavo("calibrate", tmp_path / "captured", tmp_path / "out", "--accuracy", "plain")
    octavo("compare", tmp_path / "model", tmp_path / "out", *video, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "no decoder" in text
    assert "middle frame of" in text


def test_the_bundled_model_is_judged(tmp_path):
    output = octavo("compare", "demo", "demo-int8", "--limit", 2, "--steps", 6, "-o", tmp_path / "r.html", "--json")
    judged = lines(output)["done"]["totals"]["judged"]
    assert judged["of"] == 2
    assert 0 <= judged["quantized"] <= 2
    assert f"{judged['quantized']} of 2" in (tmp_path / "r.html").read_text()


def test_the_page_of_a_calibration_has_no_pictures_and_no_times(quantized):
    text = (quantized / "report.html").read_text()
    assert "<img" not in text
    assert 'aria-label="SQNR of' in text
    report = json.loads((quantized / "report.json").read_text())
    assert page([{"report": report | {"seconds": {}, "peak_memory": 1}}]).decode() == text
