"""LoRAs are added to the weights that are captured, calibrated, drawn with and compared; files that do not fit are
refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.capture.errors import OctavoError
from octavo.checkpoints import open_pipeline
from octavo.pipelines.load import load_pipeline
from octavo.pipelines.loras import Lora, parse_loras

from ..helpers.commands import errors, octavo

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2", "proj_out")
SMALL = ("--steps", 2, "--height", 16, "--width", 16, "--device", "cpu")


def refused(code: int, *arguments: object) -> str:
    """Runs a command that ends with the exit code `code`, and returns its only error line."""
    (line,) = errors(octavo(*arguments, code=code))
    return line


def tensors_of(model: Path, rank: int = 3) -> dict[str, Tensor]:
    """Returns a random LoRA for LAYERS of the transformer in `model`, in the names of diffusers."""
    torch.manual_seed(1)
    transformer, tensors = load_pipeline(model).transformer, {}
    for name in LAYERS:
        outputs, inputs = transformer.get_submodule(name).weight.shape
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, inputs) / inputs**0.5
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(outputs, rank) / rank**0.5
    return tensors


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors_of(tiny_model), file)
    return file


def test_the_products_are_added_to_the_weights_and_nothing_else_changes(tiny_model, lora):
    tensors = load_file(lora)
    before, after = load_pipeline(tiny_model), load_pipeline(tiny_model, loras=[Lora(lora, 0.5), Lora(lora, 2.0)])
    one, two = before.transformer.state_dict(), after.transformer.state_dict()
    assert list(one) == list(two)
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert changed == {f"{name}.weight" for name in LAYERS}
    for name in LAYERS:
        product = tensors[f"transformer.{name}.lora_B.weight"] @ tensors[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(two[f"{name}.weight"], one[f"{name}.weight"] + 2.5 * product, rtol=1e-5, atol=1e-5)
    assert all(
        type(module) is type(after.transformer.get_submodule(name))
        for name, module in before.transformer.named_modules()
    )


@pytest.mark.parametrize("form", ["ascend", "diffusers"])
def test_a_capture_with_a_lora_is_calibrated_and_drawn_with_it(tiny_model, lora, tmp_path, form):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue ring\na white cross")
    capture, out = tmp_path / "capture", tmp_path / "out"
    octavo("capture", tiny_model, capture, "--prompts", tmp_path / "prompts.txt", "--lora", f"{lora}:0.5", *SMALL)
    assert f"{lora}:0.5" in octavo("inspect", capture)
    octavo("calibrate", capture, out, "--format", form, "--accuracy", "plain", "--device", "cpu")
    float_weights = load_pipeline(tiny_model, loras=[Lora(lora, 0.5)]).transformer.state_dict()
    layers = open_pipeline(str(out), None, None, dtype=None, device=torch.device("cpu")).transformer
    plain = load_pipeline(tiny_model).transformer.state_dict()
    name = LAYERS[0]
    layer, weight = layers.get_submodule(name), float_weights[f"{name}.weight"]
    error = layer.weight.float() * layer.weight_scale[:, None] - weight
    assert float(error.norm()) < 0.02 * float(weight.norm()) < 0.5 * float((weight - plain[f"{name}.weight"]).norm())
    octavo("compare", tiny_model, out, "-o", tmp_path / "page.html", "--limit", 1, "--min-sqnr", 15, *SMALL)
    octavo("generate", out, "a ring", "-o", tmp_path / "ring.png", *SMALL)
    assert "integers" in refused(2, "generate", out, "a ring", "-o", tmp_path / "b.png", "--lora", lora, *SMALL)
    assert "--memory" in refused(2, "calibrate", capture, tmp_path / "small", "--memory", "4GB", "--device", "cpu")


def test_a_lora_changes_the_picture_of_the_float_model(tiny_model, lora, tmp_path):
    for name, more in (("plain", ()), ("styled", ("--lora", f"{lora}:3"))):
        octavo("generate", tiny_model, "a ring", "-o", tmp_path / f"{name}.png", *SMALL, *more)
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "styled.png").read_bytes()


def shortened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:, :-1].contiguous() if "lora_A" in name else value for name, value in tensors.items()}


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value.clone() for name, value in tensors.items()}


BAD = {
    "of another size": shortened,
    "of other layers": lambda tensors: renamed(tensors, "transformer_blocks", "layers"),
    "with one layer more": lambda tensors: tensors | renamed(tensors, "transformer_blocks.0", "transformer_blocks.9"),
    "of another component": lambda tensors: renamed(tensors, "transformer.", "unet."),
    "not a LoRA": lambda tensors: renamed(tensors, "lora_", "matrix_"),
}


@pytest.mark.parametrize("kind", BAD)
def test_files_that_do_not_fit_are_refused_in_one_line(tiny_model, tmp_path, kind):
    save_file(BAD[kind](tensors_of(tiny_model)), tmp_path / "bad.safetensors")
    message = refused(4, "capture", tiny_model, tmp_path / "c", "--lora", tmp_path / "bad.safetensors", *SMALL)
    assert "bad.safetensors" in message
    assert "Give a LoRA of this model" in message
    assert not (tmp_path / "c" / "complete.json").exists()


@pytest.mark.parametrize("text", ["none.safetensors", "{0}:nan", "{0}:x", "{0}:", "{1}", "{0}:inf"])
def test_texts_that_name_no_lora_are_refused(lora, tmp_path, text):
    (tmp_path / "pickle.bin").write_bytes(b"x")
    with pytest.raises(OctavoError, match="LoRA") as error:
        parse_loras([text.format(lora, tmp_path / "pickle.bin")])
    assert error.value.exit_code == 2


def test_a_truncated_file_is_refused(tiny_model, lora, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:-100])
    assert "cut.safetensors" in refused(
        4, "capture", tiny_model, tmp_path / "c", "--lora", tmp_path / "cut.safetensors", *SMALL
    )
