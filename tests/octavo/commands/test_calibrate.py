"""Checks that `octavo calibrate` makes a checkpoint of a capture, that `octavo inspect` verifies it, and what both
refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.manifest import MANIFEST
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.settings import RECIPES
from octavo.capture.pth.pth import save_pth
from octavo.capture.store.reader import Capture
from octavo.pipelines.load import load_pipeline

from ...helpers.commands import capture, errors, octavo

WEIGHTS = "quant_model_weight_w8a8.safetensors"


def files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a checkpoint without the report, which holds times, and the manifest, which holds the
    report's digest."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in ("report.json", MANIFEST)}


def test_the_checkpoint_is_the_same_twice_and_its_integers_compute_the_model(
    tiny_model, captured, checkpoint, tmp_path
):
    output = octavo("calibrate", captured, tmp_path / "a")
    assert "layers in 8-bit integers" in output
    assert "context_embedder" in output
    assert files(tmp_path / "a") == files(checkpoint())
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    layers = load_ascend(tmp_path / "a")
    assert sorted(layers) == sorted(row["name"] for row in report["layers"] if row["scheme"])
    transformer = load_pipeline(tiny_model).transformer
    calls = list(Capture.open(captured).calls())
    with torch.no_grad():
        exact = [transformer(**call.kwargs)[0] for call in calls]
        with quantized(transformer, layers):
            approximate = [transformer(**call.kwargs)[0] for call in calls]
    error = sum(float((a - b).square().sum()) for a, b in zip(exact, approximate, strict=True))
    power = sum(float(a.square().sum()) for a in exact)
    assert 0 < error < power * 10 ** -(report["totals"]["output_sqnr"] / 10 - 1)


def test_every_linear_and_convolution_has_a_row_and_floats_a_reason(tiny_model, captured, tmp_path):
    octavo("calibrate", captured, tmp_path / "a", "--keep-float", "*.ff.*", "--quantize", "proj_out")
    rows = {row["name"]: row for row in json.loads((tmp_path / "a" / "report.json").read_text())["layers"]}
    transformer = load_pipeline(tiny_model).transformer
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    assert set(rows) == {name for name, module in transformer.named_modules() if isinstance(module, kinds)}
    assert all(row["scheme"] or row["reason"] for row in rows.values())
    assert rows["proj_out"]["scheme"] == "W8A8"
    assert rows["transformer_blocks.0.ff.net.2"]["reason"] == "kept float on request"


@pytest.mark.parametrize("observer", ["minmax", "sigma", "percentile", "mse"])
def test_every_observer_reaches_the_file(captured, checkpoint, tmp_path, observer):
    octavo("calibrate", captured, tmp_path / "a", "--observer", observer, *(("--sigma", 2) * (observer == "sigma")))
    ranges = [
        row["range"] for row in json.loads((tmp_path / "a" / "report.json").read_text())["layers"] if row["scheme"]
    ]
    widest = [row["range"] for row in report_of(checkpoint("--observer", "minmax"))["layers"] if row["scheme"]]
    assert all(low >= most[0] and high <= most[1] for (low, high), most in zip(ranges, widest, strict=True))
    assert (ranges == widest) == (observer == "minmax")


@pytest.mark.parametrize(
    ("dtype", "deq"), [("bfloat16", torch.float32), ("float16", torch.int64), ("float32", torch.int64)]
)
def test_the_dtype_of_the_deployment(checkpoint, dtype, deq):
    out = checkpoint("--accuracy", "plain", "--dtype", dtype)
    tensors = load_file(out / WEIGHTS)
    assert tensors["proj_out.weight"].dtype == getattr(torch, dtype)
    assert tensors["transformer_blocks.0.attn.to_q.deq_scale"].dtype == deq
    output = octavo("inspect", out)
    assert ("no  MindIE-SD  in bfloat16" in output) == (deq == torch.int64)


def test_weight_only_and_symmetric(checkpoint):
    description = json.loads((checkpoint("--weight-only") / "quant_model_description_w8a16.json").read_text())
    assert "W8A16" in set(description.values())
    tensors = load_file(checkpoint("--symmetric") / WEIGHTS)
    assert all(not tensor.any() for name, tensor in tensors.items() if name.endswith("input_offset"))


def test_samples_limits_the_number_of_calls(captured, tmp_path):
    octavo("calibrate", captured, tmp_path / "a", "--samples", 2)
    assert json.loads((tmp_path / "a" / "report.json").read_text())["totals"]["calls"] == 2


def test_a_config_file_gives_options_and_the_command_line_wins(captured, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text('observer = "minmax"\nkeep_float = ["*.ff.*"]\n')
    octavo("calibrate", captured, tmp_path / "a", "--config", config, "--observer", "mse")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["settings"]["observer"] == "mse"
    assert report["settings"]["keep_float"] == ["*.ff.*"]
    config.write_text("observers = 1\n")
    assert "did you mean 'observer'" in octavo("calibrate", captured, tmp_path / "b", "--config", config, code=2)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--keep-float", "nope"), 2, "'nope' matches no layer. The nearest name is"),
        (("--keep-float", "*"), 2, "no layer is left"),
        (("--quantize", "nope"), 2, "'nope' names no layers that stay float by default"),
        (("--sigma", 101), 2, "outside 0 to 100"),
        (("--sigma", 2), 2, "only works with --observer sigma"),
        (
            ("--weight-only", "--activations", "dynamic"),
            2,
            "so --activations dynamic has no effect. Remove --activations dynamic or --weight-only.",
        ),
        (("--weight-only", "--symmetric"), 2, "so --symmetric has no effect. Remove --symmetric or --weight-only."),
        (("--accuracy", "best", "--observer", "mse"), 2, "dynamic activations have no range"),
        (("--keep-float", "a", "--quantize", "a"), 2, "--keep-float has the same pattern"),
        (("--format", "gguf"), 2, "there is no format 'gguf'"),
        (
            ("--attention", "write", "--format", "ascend,diffusers"),
            2,
            "format diffusers cannot ask for quantized attention",
        ),
        (("--attention", "write", "--format", "comfy", "--activations", "dynamic"), 2, "whose attention reads no"),
        (("--component", "unet"), 2, "no calls of 'unet'"),
        (("--device", "npu"), 7, "torch_npu is not installed"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_nothing(captured, tmp_path, more, code, words):
    output = octavo("calibrate", captured, tmp_path / "a", *more, code=code)
    assert len(errors(output)) == 1
    assert words in errors(output)[0]
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused(tiny_model, captured, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"] += 1
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})
    output = octavo("calibrate", captured, tmp_path / "a", "--model", other, code=4)
    assert "this model is rev" in output
    octavo("calibrate", captured, tmp_path / "a", "--model", other, "--allow-revision")
    config = json.loads((other / "transformer" / "config.json").read_text())
    shutil.rmtree(other / "transformer")
    from diffusers import SD3Transformer2DModel

    names = {name: value for name, value in config.items() if not name.startswith("_")}
    SD3Transformer2DModel(**names | {"num_layers": 1}).save_pretrained(other / "transformer")
    output = octavo("calibrate", captured, tmp_path / "b", "--model", other, "--allow-revision", code=4)
    assert "other tensors" in output


def test_an_old_checkpoint_stays_until_it_is_to_be_replaced(captured, checkpoint, tmp_path):
    shutil.copytree(checkpoint(), tmp_path / "a")
    before = files(tmp_path / "a")
    assert "Use --overwrite" in octavo("calibrate", captured, tmp_path / "a", "--symmetric", code=5)
    assert files(tmp_path / "a") == before
    octavo("calibrate", captured, tmp_path / "a", "--symmetric", "--overwrite")
    assert files(tmp_path / "a") != before


def test_inspect_finds_a_damaged_checkpoint(checkpoint, tmp_path):
    shutil.copytree(checkpoint("--accuracy", "plain"), tmp_path / "a")
    assert json.loads(octavo("inspect", tmp_path / "a", "--json"))["sound"] is True
    (tmp_path / "a" / WEIGHTS).chmod(0o644)
    output = octavo("inspect", tmp_path / "a", code=3)
    assert "mode 0644 allows more than 0640" in output
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    del tensors["transformer_blocks.0.attn.to_q.quant_bias"]
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    assert "damaged (" in octavo("inspect", tmp_path / "a", code=3)
    (tmp_path / "a" / MANIFEST).unlink()
    assert "quant_bias" in octavo("inspect", tmp_path / "a", code=3)


def test_inspect_finds_integers_that_do_not_compute_the_layer(checkpoint, tmp_path):
    shutil.copytree(checkpoint("--accuracy", "plain"), tmp_path / "a")
    file = tmp_path / "a" / WEIGHTS
    tensors = load_file(file)
    tensors["transformer_blocks.0.attn.to_q.quant_bias"][3] += 3
    file.chmod(0o600)
    save_file(tensors, file)
    (tmp_path / "a" / MANIFEST).unlink()
    output = octavo("inspect", tmp_path / "a", code=3)
    assert "no  octavo     integers: computed as npu_quant_matmul does, the largest error is" in output
    assert "(transformer_blocks.0.attn.to_q)" in output


def test_the_documented_list_of_inputs_becomes_a_capture(tiny_model, captured, tmp_path):
    inputs = [call.kwargs for call in Capture.open(captured).calls()]
    torch.save(inputs, tmp_path / "calls.pth")
    octavo("convert-pth", tmp_path / "calls.pth", tmp_path / "converted")
    stored = list(Capture.open(tmp_path / "converted").calls())
    assert len(stored) == len(inputs)
    assert all(torch.equal(a["hidden_states"], b.kwargs["hidden_states"]) for a, b in zip(inputs, stored, strict=True))


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("accuracy", ["plain", "fast", "balanced"])
def test_recipes_of_accuracy(checkpoint, accuracy):
    out = checkpoint("--accuracy", accuracy)
    settings, recipe = report_of(out)["settings"], RECIPES[accuracy]
    assert {name: settings[name] for name in recipe} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in recipe.items()
    }
    assert json.loads(octavo("inspect", out, "--json"))["sound"] is True
    smoothed = [name for name, layer in load_ascend(out).items() if layer.mul_scale is not None]
    assert bool(smoothed) == (accuracy != "plain")


@pytest.mark.parametrize(("activations", "scheme"), [("timestep", "W8A8_TIMESTEP"), ("dynamic", "W8A8_DYNAMIC")])
def test_kinds_of_activations(captured, checkpoint, activations, scheme):
    out = checkpoint("--activations", activations)
    layers = load_ascend(out)
    assert {layer.scheme for layer in layers.values()} == {scheme}
    if activations == "timestep":
        levels = {float(call.kwargs["timestep"].max()) for call in Capture.open(captured).calls()}
        assert {len(layer.input_scale) for layer in layers.values()} == {len(levels)}
    assert json.loads(octavo("inspect", out, "--json"))["sound"] is True


def test_options_win_over_the_recipe(captured, tmp_path):
    more = ("--accuracy", "balanced", "--no-smoothing", "--weights", "admm", "--no-bias-correction")
    octavo("calibrate", captured, tmp_path / "a", *more)
    report = report_of(tmp_path / "a")
    assert report["settings"]["weights"] == ["admm"]
    assert not report["settings"]["smoothing"]
    assert "admm" in {row["weights"] for row in report["layers"] if row["scheme"]}
    assert not any(row["corrected"] or "multiplier" in row for row in report["layers"] if row["scheme"])
    assert all(layer.mul_scale is None for layer in load_ascend(tmp_path / "a").values())


@pytest.mark.parametrize("more", [("--accuracy", "most"), ("--activations", "none"), ("--weights", "floor")])
def test_unknown_words_are_refused(captured, tmp_path, more):
    octavo("calibrate", captured, tmp_path / "a", *more, code=2)
    assert not list(tmp_path.iterdir())


def test_how_many_calls_were_enough_is_said_and_written(tiny_model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red circle and {number} rings" for number in range(10)))
    capture(tiny_model, tmp_path / "capture", prompts, "--steps", 16)
    output = octavo("calibrate", tmp_path / "capture", tmp_path / "a", "--accuracy", "plain")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    rows, totals = report["enough"], report["totals"]
    assert [(row["calls"], row["prompts"]) for row in rows] == [(128, 8), (160, 10)]
    low, high = totals["output_sqnr_interval"]
    assert low < totals["output_sqnr"] < high
    assert rows[-1]["output_sqnr"] == totals["output_sqnr"]
    quality = f"{totals['output_sqnr']:.1f} dB (95 % interval {low:.1f} to {high:.1f})"
    assert f"output SQNR {quality} on 16 calls, 8 of them held out" in " ".join(output.split())
    assert any(words in output for words in ("were enough", "was enough", "More calls would help", "still helped"))


def test_a_converted_file_is_calibrated_with_the_model_that_is_named(tiny_model, captured, tmp_path):
    save_pth(tmp_path / "calls.pth", Capture.open(captured).calls())
    octavo("convert-pth", tmp_path / "calls.pth", tmp_path / "converted")
    output = octavo("calibrate", tmp_path / "converted", tmp_path / "out", code=2)
    assert "does not say which model it was recorded from. Give the model with --model." in output
    output = octavo("calibrate", tmp_path / "converted", tmp_path / "out", "--model", tiny_model, "--accuracy", "plain")
    assert "They are replayed through the transformer of" in output
    assert load_ascend(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["component"] == "transformer"
    assert report["totals"]["calls"] == 9
    wrong = ("--model", tiny_model, "--component", "nothing")
    octavo("calibrate", tmp_path / "converted", tmp_path / "other", *wrong, code=2)
