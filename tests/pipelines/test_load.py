"""Checks that a model directory is loaded unchanged, or refused in one line that names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.pipelines.load import check_finite, load_pipeline

from ..helpers.refusals import refused
from ..zoo.pipelines import make
from ..zoo.whole_sd3 import whole_sd3

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """Copies the tiny model for a test that damages it."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(file: Path, change) -> None:
    weights = load_file(file)
    change(weights)
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})


def refused_load(model: Path, code: int, *words: str, **options) -> None:
    refused(lambda: load_pipeline(model, **options), code, *words)


def test_a_sound_directory_loads_in_float32_on_the_cpu_with_the_stored_weights(model):
    pipe = load_pipeline(model)
    assert pipe.transformer.dtype == torch.float32
    stored = load_file(model / "transformer" / WEIGHTS)
    assert all(torch.equal(pipe.transformer.state_dict()[name], tensor) for name, tensor in stored.items())
    assert load_pipeline(model, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_a_missing_directory_and_a_missing_index_are_refused(tmp_path):
    refused_load(tmp_path / "none", 2, "no such model directory")
    refused_load(tmp_path, 3, "no model_index.json. Give the directory of a whole diffusers pipeline.")


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_model_in_one_file_is_refused_with_the_way_to_a_directory(tmp_path, suffix):
    file = tmp_path / f"model.{suffix}"
    file.touch()
    advice = "StableDiffusionXLPipeline.from_single_file('model."
    refused_load(file, 2, "a single file, not a directory", advice)
    refused_load(tmp_path, 3, f"model.{suffix} is a single file", advice)


def test_a_quantized_denoiser_in_one_file_and_any_other_file_are_refused(model, tmp_path):
    (tmp_path / "model.gguf").touch()
    refused_load(tmp_path / "model.gguf", 2, "a denoiser that is already quantized")
    refused_load(model / "model_index.json", 2, "a file. Give the directory of a whole diffusers pipeline.")


def test_a_folder_in_or_above_the_pipeline_is_refused_with_the_right_one(model, tmp_path):
    refused_load(model / "transformer", 3, f"It holds one component of a pipeline. Give {model}.")
    refused_load(tmp_path, 3, f"no model_index.json. Give {model}.")
    shutil.move(model, tmp_path / "models--a" / "snapshots" / "0")
    refused_load(tmp_path / "models--a", 3, f"Give {tmp_path / 'models--a' / 'snapshots' / '0'}.")


def test_a_folder_of_a_component_alone_is_refused(model, tmp_path):
    alone = shutil.copytree(model / "transformer", tmp_path / "somewhere" / "transformer")
    refused_load(alone, 3, "It holds one component. Give the directory of a whole diffusers pipeline.")


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_broken_index_is_refused(model, text):
    (model / "model_index.json").write_bytes(text.encode("latin-1"))
    refused_load(model, 3, "model_index.json")


def test_a_broken_config_of_a_component_is_refused(model):
    (model / "transformer" / "config.json").write_text("{")
    refused_load(model, 3, "transformer", "not valid JSON")


@pytest.mark.parametrize("place", ["pipeline.py", "transformer/mine.py", "custom.py"])
def test_custom_code_is_not_run(model, tmp_path, place):
    marker = tmp_path / "marker"
    (model / place).write_text(f"open({str(marker)!r}, 'w').close()")
    index = json.loads((model / "model_index.json").read_text())
    if place == "custom.py":
        (model / "model_index.json").write_text(json.dumps(index | {"_class_name": ["custom", "Mine"]}))
    refused_load(model, 3, "needs custom code", "--trust-remote-code")
    assert not marker.exists()


def test_pickled_weights_are_never_opened(model, tmp_path):
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (model / "transformer" / WEIGHTS).unlink()
    torch.save({"x": Evil()}, model / "transformer" / "diffusion_pytorch_model.bin")
    refused_load(model, 3, "transformer: no safetensors weights")
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 7, 100, -10])
def test_truncated_weights_are_refused(model, keep):
    file = model / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    refused_load(model, 3, WEIGHTS, "truncated or damaged")


@pytest.mark.parametrize(
    ("part", "file", "name"),
    [("transformer", WEIGHTS, "proj_out.bias"), ("text_encoder", "model.safetensors", "text_projection.weight")],
)
def test_a_missing_weight_is_refused_as_it_would_be_random(model, part, file, name):
    edit(model / part / file, lambda weights: weights.pop(name))
    refused_load(model, 4, f"{part}: 1 weight missing ({name}); it would be random")


def test_a_surplus_weight_warns_and_is_refused_when_strict(model, caplog):
    edit(model / "transformer" / WEIGHTS, lambda weights: weights.update(surplus=torch.zeros(1)))
    load_pipeline(model)
    assert "surplus" in caplog.text
    refused_load(model, 4, "surplus", strict=True)


def test_codes_in_fp8_are_finite_but_for_nan():
    codes = torch.ones(3, 4).to(torch.float8_e4m3fn)
    module = torch.nn.ParameterDict({"weight": torch.nn.Parameter(codes, requires_grad=False)})
    check_finite(module, "transformer")
    codes[1, 2] = float("nan")
    refused(lambda: check_finite(module, "transformer"), 6, "transformer.weight: 1 of 12 values are not finite")


def test_float16_on_a_cpu_is_loaded_without_a_warning_of_diffusers(model, capfd):
    assert load_pipeline(model, dtype=torch.float16).transformer.dtype == torch.float16
    assert "cannot run" not in capfd.readouterr().err


def test_a_misshapen_weight_is_refused(model):
    edit(model / "transformer" / WEIGHTS, lambda weights: weights.update({"proj_out.bias": torch.zeros(3)}))
    refused_load(model, 4, "proj_out.bias")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(model, value):
    edit(model / "transformer" / WEIGHTS, lambda weights: weights["proj_out.bias"][2:3].fill_(value))
    refused_load(model, 6, "transformer.proj_out.bias: 1 of 16 values are not finite")


def test_a_folder_that_the_index_names_is_missing(model):
    shutil.rmtree(model / "vae")
    refused_load(model, 3, "no folder vae")


def test_a_component_that_a_pipeline_has_as_optional_is_the_one_that_is_given(tmp_path):
    pipe, _ = make("wan22")
    pipe.save_pretrained(tmp_path / "wan")
    pipe.transformer.requires_grad_(False).proj_out.bias.fill_(7.0)
    loaded = load_pipeline(tmp_path / "wan", given={"transformer": pipe.transformer})
    assert loaded.transformer is pipe.transformer
    file = tmp_path / "wan" / "transformer_2" / WEIGHTS
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    loaded = load_pipeline(tmp_path / "wan")
    assert torch.equal(loaded.transformer_2.state_dict()["proj_out.weight"], pipe.transformer_2.proj_out.weight)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Writes a pipeline with text encoders and tokenizers. Read only."""
    return whole_sd3(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer/tokenizer.json", "version", True),
        ("tokenizer/tokenizer.json", "added_tokens", [{"x": 1}]),
        ("tokenizer/tokenizer_config.json", "model_max_length", "long"),
        ("text_encoder/config.json", "num_attention_heads", [[1]]),
        ("text_encoder_2/config.json", "vocab_size", 0.5),
        ("vae/config.json", "block_out_channels", 5),
        ("scheduler/scheduler_config.json", "shift", "x"),
        ("model_index.json", "transformer", {"a": 1}),
        ("model_index.json", "_class_name", []),
    ],
)
def test_a_wrong_value_in_any_json_file_is_refused(whole, tmp_path, file, key, value):
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    content = json.loads((model / file).read_text()) | {key: value}
    (model / file).unlink()
    (model / file).write_text(json.dumps(content))
    refused_load(model, 3, str(model))
