"""Checks which weight files of a model folder are loaded, and that an unclear choice is refused."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from octavo.pipelines.load import load_pipeline
from octavo.pipelines.weights import stored_dtype, weights_of

from ..helpers.refusals import refused
from ..zoo.parts import built
from ..zoo.unet_pipelines import CROSS, controlnet, sd_parts

STEM = "diffusion_pytorch_model"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """Copies the tiny model for a test that changes it."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def sharded(tiny_model: Path, tmp_path: Path) -> Path:
    """Copies the tiny model, with a transformer in several files of the variant fp16."""
    model = shutil.copytree(tiny_model, tmp_path / "sharded")
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(model / "transformer")
    shutil.rmtree(model / "transformer")
    transformer.save_pretrained(model / "transformer", variant="fp16", max_shard_size="50KB")
    return model


def same_weights(model: Path, other: Path) -> bool:
    one, two = (load_pipeline(directory).transformer.state_dict() for directory in (model, other))
    return all(torch.equal(one[name], two[name]) for name in one)


def test_the_only_variant_of_each_folder_is_loaded(model, tiny_model):
    for name, variant in (("transformer", "fp16"), ("text_encoder", "bf16")):
        (file,) = (model / name).glob("*.safetensors")
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
        assert weights_of(model / name).variant == variant
    assert same_weights(model, tiny_model)


def test_the_default_weights_are_loaded_where_there_are_variants_too(model, tiny_model):
    folder = model / "transformer"
    for variant in ("fp16", "non_ema"):
        (folder / f"{STEM}.{variant}.safetensors").write_bytes(b"never read")
    (folder / f"{STEM}.bin").write_bytes(b"never read")
    assert weights_of(folder).files == (folder / f"{STEM}.safetensors",)
    assert same_weights(model, tiny_model)


def test_several_variants_without_a_default_are_refused_by_name(model):
    folder = model / "transformer"
    shutil.copy(folder / f"{STEM}.safetensors", folder / f"{STEM}.bf16.safetensors")
    (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.fp16.safetensors")
    refused(lambda: load_pipeline(model), 2, str(folder), "variants bf16, fp16", "variant='bf16'")


def test_shards_of_a_variant_are_loaded_and_others_are_not_read(sharded, tiny_model):
    folder = sharded / "transformer"
    assert len(weights_of(folder).files) > 1
    (folder / f"{STEM}.fp16-00009-of-00009.safetensors").write_bytes(b"left over")
    assert stored_dtype(folder) == "float32"
    assert same_weights(sharded, tiny_model)


def test_a_shard_that_is_missing_is_named(sharded):
    file = weights_of(sharded / "transformer").files[-1]
    file.unlink()
    refused(lambda: load_pipeline(sharded), 3, f"no file {file.name}, which {STEM}.safetensors.index.fp16.json names")


@pytest.mark.parametrize("entries", [None, [], {}, {"proj_out.weight": 1}, {"proj_out.weight": "../other.safetensors"}])
def test_an_index_without_files_in_the_folder_is_refused(sharded, entries):
    index = sharded / "transformer" / f"{STEM}.safetensors.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": entries}))
    refused(lambda: load_pipeline(sharded), 3, "index.fp16.json")


def test_an_index_wins_over_a_single_file_beside_it(sharded, tiny_model):
    folder = sharded / "transformer"
    for shard in weights_of(folder).files:  # the same shards without a variant
        shutil.copy(shard, folder / shard.name.replace(".fp16", ""))
    index = (folder / f"{STEM}.safetensors.index.fp16.json").read_text().replace(".fp16", "")
    (folder / f"{STEM}.safetensors.index.json").write_text(index)
    (folder / f"{STEM}.safetensors").write_bytes(b"not what diffusers reads")
    assert same_weights(sharded, tiny_model)


def test_a_component_that_diffusers_keeps_with_a_pipeline_may_be_a_variant(tmp_path):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        vision_config=dict(image_size=32, patch_size=8, **small), projection_dim=16,
        text_config=dict(vocab_size=520, **small),
    )  # fmt: skip
    parts = sd_parts() | {"safety_checker": StableDiffusionSafetyChecker(config)}
    pipe = built("StableDiffusionPipeline", **parts, feature_extractor=CLIPImageProcessor())
    pipe.to(torch.float16).save_pretrained(tmp_path / "sd", variant="fp16")
    loaded = load_pipeline(tmp_path / "sd")
    assert type(loaded.safety_checker) is StableDiffusionSafetyChecker
    weights = load_file(tmp_path / "sd" / "safety_checker" / "model.fp16.safetensors")
    assert torch.equal(loaded.safety_checker.state_dict()["concept_embeds"], weights["concept_embeds"].float())


def test_several_nets_of_one_class_are_loaded_from_their_folders(tmp_path):
    adapters = [
        diffusers.T2IAdapter(in_channels=3, channels=[4, 8], num_res_blocks=1, downscale_factor=2) for _ in range(2)
    ]
    parts = sd_parts(down_block_types=CROSS[::-1])
    cases = {
        "controlnet": built("StableDiffusionControlNetPipeline", **sd_parts(), controlnet=[controlnet() for _ in "ab"]),
        "adapter": built("StableDiffusionAdapterPipeline", **parts, adapter=adapters),
    }
    for name, pipe in cases.items():
        pipe.save_pretrained(tmp_path / name)
        loaded, saved = getattr(load_pipeline(tmp_path / name), name), getattr(pipe, name)
        assert type(loaded) is type(saved)
        assert loaded.state_dict().keys() == saved.state_dict().keys()
        assert all(torch.equal(tensor, saved.state_dict()[key]) for key, tensor in loaded.state_dict().items())
        second = tmp_path / name / f"{name}_1" / f"{STEM}.safetensors"
        second.write_bytes(second.read_bytes()[:100])
        refused(lambda place=tmp_path / name: load_pipeline(place), 3, f"{name}_1", "truncated or damaged")
