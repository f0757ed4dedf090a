"""Checks that folders of Open-Sora-Plan 1.2, with field names of their own, load and run through capture, calibrate and
inspect."""

import json

import pytest
import torch
from diffusers import AllegroTransformer3DModel
from safetensors.torch import save_file
from torch import nn

from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.capture.store.reader import Capture
from octavo.pipelines.opensora_plan import load_pipeline, load_transformer, transformer_config

from ..helpers.commands import octavo
from ..helpers.refusals import refused
from ..zoo.opensora import CAPTION_CHANNELS, tiny_text_encoder, tiny_tokenizer

WORDS = {
    "_class_name": "OpenSoraT2V", "_diffusers_version": "0.27.2", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 12, "attention_mode": "xformers", "attention_type": "default",
    "caption_channels": CAPTION_CHANNELS, "cross_attention_dim": 24, "double_self_attention": False,
    "downsampler": None, "dropout": 0.0, "in_channels": 4, "interpolation_scale_h": 1.0, "interpolation_scale_t": 1.0,
    "interpolation_scale_w": 1.0, "norm_elementwise_affine": False, "norm_eps": 1e-06, "norm_num_groups": 32,
    "norm_type": "ada_norm_single", "num_attention_heads": 2, "num_embeds_ada_norm": 1000, "num_layers": 2,
    "only_cross_attention": False, "out_channels": 4, "patch_size": 2, "patch_size_t": 1, "sample_size": [6, 8],
    "sample_size_t": 4, "upcast_attention": False, "use_additional_conditions": None, "use_rope": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Writes a tiny folder in the form of one size of LanguageBind/Open-Sora-Plan-v1.2.0. Returns it with its model."""
    torch.manual_seed(0)
    model = AllegroTransformer3DModel(**transformer_config(WORDS, tmp_path)).eval()
    folder = tmp_path / "93x480p"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(WORDS))
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder, model


def test_a_downloaded_folder_loads_with_every_weight(folder):
    path, model = folder
    loaded = load_transformer(path)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert load_transformer(path, torch.bfloat16).dtype == torch.bfloat16


def test_scales_that_are_not_said_follow_from_the_size(tmp_path):
    words = {name: value for name, value in WORDS.items() if not name.startswith("interpolation")}
    config = transformer_config(words | {"sample_size": [60, 80], "sample_size_t": 24}, tmp_path)
    assert [config[f"interpolation_scale_{axis}"] for axis in "thw"] == [1.5, 2.0, 2.0]
    assert transformer_config(words | {"sample_size": 64, "sample_size_t": 29}, tmp_path)["interpolation_scale_t"] == 2
    assert transformer_config(WORDS, tmp_path)["interpolation_scale_h"] == 1.0


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"norm_type": "layer_norm"}, "norm_type is 'layer_norm'"),
        ({"use_rope": False}, "use_rope is False"),
        ({"patch_size_t": 2}, "patch_size_t is 2"),
        ({"sparse1d": True}, "sparse1d is True"),
        ({"num_layers": None}, "num_layers is missing"),
        ({"num_layers": 3}, "transformer_blocks.2"),
        ({"caption_channels": 8}, "has shape"),
    ],
)
def test_another_model_is_refused(folder, change, fact):
    path, _ = folder
    (path / "config.json").write_text(json.dumps(WORDS | change))
    refused(lambda: load_transformer(path), 4, fact)


def test_capture_calibrate_inspect(folder, tmp_path):
    path, model = folder
    (tmp_path / "mt5").mkdir()
    tiny_text_encoder().save_pretrained(tmp_path / "mt5")
    tiny_tokenizer().save_pretrained(tmp_path / "mt5")
    command = (
        "capture", path, tmp_path / "captured", "--prompts", "videos", "--limit", 1, "--steps", 2, "--height", 48,
        "--width", 64, "--frames", 8, "--arg", "max_sequence_length=16",
    )  # fmt: skip
    assert "no text encoder" in octavo(*command, code=2)
    octavo(*command, "--resume", "--text-encoder", tmp_path / "mt5")
    capture = Capture.open(tmp_path / "captured")
    assert capture.manifest["family"] == "opensora-plan"
    assert [call.step for call in capture.calls()] == [0, 1]
    octavo("calibrate", tmp_path / "captured", tmp_path / "out")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name in linears if name.startswith("transformer_blocks.") and not name.endswith(".ff.net.2")}
    assert set(load_ascend(tmp_path / "out")) == inside
    octavo("inspect", tmp_path / "out")


def test_a_pipeline_without_a_text_encoder_takes_embeddings(folder):
    pipe = load_pipeline(folder[0])
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 5, CAPTION_CHANNELS)
    mask = torch.ones(1, 5, dtype=torch.long)
    video = pipe(
        prompt_embeds=embeds, prompt_attention_mask=mask, negative_prompt=None, negative_prompt_embeds=embeds * 0,
        negative_prompt_attention_mask=mask, num_inference_steps=2, height=48, width=64, num_frames=8,
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    assert video.shape == (1, 4, 2, 6, 8)
    assert bool(video.isfinite().all())
