"""Checks that folders of the transformer, downloaded or written by diffusers, load, and that damaged ones are
refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.pipelines.opensora import OpenSoraPipeline, RFlowScheduler, STDiT3, load_pipeline, load_transformer

from ...helpers.refusals import refused
from ...zoo.opensora import SMALL, tiny_pipeline, tiny_transformer

FOREIGN = {"architectures": ["STDiT3"], "model_type": "STDiT3", "torch_dtype": "float32", "unheard_of": 3}


def downloaded(directory: Path, model: STDiT3) -> Path:
    """Writes a folder in the form of hpcai-tech/OpenSora-STDiT-v3."""
    directory.mkdir()
    fields = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    (directory / "config.json").write_text(json.dumps(fields | FOREIGN))
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in a.state_dict().items())


def test_a_downloaded_folder_loads_and_unknown_fields_are_left_out(tmp_path: Path) -> None:
    model = tiny_transformer(qk_norm=False, mlp_ratio=2.0)
    loaded = load_transformer(downloaded(tmp_path / "hub", model))
    assert same(model, loaded)
    assert not loaded.training
    assert loaded.config["qk_norm"] is False
    assert not loaded.rope.freqs.requires_grad
    assert loaded.x_embedder.proj.weight.requires_grad


def test_a_diffusers_directory_loads_whole_and_in_shards(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert same(model, load_transformer(tmp_path / "one"))
    assert same(model, load_transformer(tmp_path / "many"))
    assert same(model, STDiT3.from_pretrained(tmp_path / "one"))


def test_the_dtype_is_that_of_the_file_or_the_one_asked_for(tmp_path: Path) -> None:
    folder = downloaded(tmp_path / "hub", tiny_transformer().to(torch.bfloat16))
    assert load_transformer(folder).dtype == torch.bfloat16
    assert load_transformer(folder, torch.float32).dtype == torch.float32


def _drop(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["temporal_blocks.1.mlp.fc1.weight"]
    save_file(state, folder / "model.safetensors")


def _shrink(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["final_layer.linear.bias"] = state["final_layer.linear.bias"][:-1].clone()
    save_file(state, folder / "model.safetensors")


def _add(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"spatial_blocks.9.attn.qkv.bias": torch.zeros(3)}, folder / "model.safetensors")


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FAULTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "tensor missing": (_drop, 4, "temporal_blocks.1.mlp.fc1.weight is missing"),
    "tensor misshapen": (_shrink, 4, "final_layer.linear.bias has shape (31,), but the model needs (32,)"),
    "tensor too many": (_add, 4, "spatial_blocks.9.attn.qkv.bias has no place"),
    "file cut off": (_cut, 3, "truncated or damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), 3, "Download the weights"),
    "no config": (lambda f: (f / "config.json").unlink(), 3, "config.json: it does not exist"),
    "config cut off": (lambda f: (f / "config.json").write_text('{"depth": 2,'), 3, "not valid JSON"),
    "config no table": (lambda f: (f / "config.json").write_text("[]"), 3, "does not hold a JSON object"),
    "impossible config": (lambda f: (f / "config.json").write_text('{"depth": "many"}'), 4, "no model can be built"),
}


@pytest.mark.parametrize(("damage", "code", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path, damage: Callable, code: int, message: str) -> None:
    folder = downloaded(tmp_path / "hub", tiny_transformer())
    damage(folder)
    refused(lambda: load_transformer(folder), code, message)


def test_a_pipeline_survives_its_directory(tmp_path: Path) -> None:
    pipe = tiny_pipeline(vae=True)
    pipe.save_pretrained(tmp_path / "pipe")
    want = pipe("a cat", generator=torch.Generator().manual_seed(0), **SMALL).frames
    for again in (OpenSoraPipeline.from_pretrained(tmp_path / "pipe"), load_pipeline(tmp_path / "pipe")):
        again.set_progress_bar_config(disable=True)
        assert isinstance(again.transformer, STDiT3)
        assert isinstance(again.scheduler, RFlowScheduler)
        got = again("a cat", generator=torch.Generator().manual_seed(0), **SMALL).frames
        assert torch.allclose(got, want, atol=1e-5)


def test_a_directory_without_text_encoder_and_vae_loads(tmp_path: Path) -> None:
    OpenSoraPipeline(tiny_transformer(), RFlowScheduler()).save_pretrained(tmp_path / "pipe")
    pipe = load_pipeline(tmp_path / "pipe", torch_dtype=torch.bfloat16)
    assert pipe.text_encoder is None
    assert pipe.transformer.dtype == torch.bfloat16


def test_a_pipeline_directory_with_a_damaged_transformer_is_refused(tmp_path: Path) -> None:
    OpenSoraPipeline(tiny_transformer(), RFlowScheduler()).save_pretrained(tmp_path / "pipe")
    weights = tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["y_embedder.y_embedding"]
    save_file(state, weights)
    refused(lambda: load_pipeline(tmp_path / "pipe"), 4, "y_embedder.y_embedding is missing")


def test_a_downloaded_folder_takes_text_encoder_and_vae_from_elsewhere(tmp_path: Path) -> None:
    parts = tiny_pipeline(vae=True)
    folder = downloaded(tmp_path / "hub", parts.transformer)
    parts.tokenizer.save_pretrained(tmp_path / "t5")
    parts.text_encoder.save_pretrained(tmp_path / "t5")
    parts.vae.save_pretrained(tmp_path / "vae")
    pipe = load_pipeline(folder, text_encoder=tmp_path / "t5", vae=tmp_path / "vae", torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder.dtype == torch.float32
    assert pipe.vae.dtype == torch.bfloat16
    assert pipe("a cat", **SMALL).frames.shape == (1, 4, 5, 5, 6)
