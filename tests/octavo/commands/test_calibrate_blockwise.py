"""Checks that `octavo calibrate --memory`, which reads the denoiser block by block, writes the same checkpoint."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from octavo.calibrate.blockwise.calibration import BlockwiseCalibration
from octavo.calibrate.formats.manifest import MANIFEST
from octavo.calibrate.settings import Settings
from octavo.capture.fingerprint import fingerprint
from octavo.pipelines import GENERIC
from octavo.pipelines.load import load_pipeline, mapped_denoiser
from octavo.pipelines.sd3 import SD3

from ...helpers.commands import errors, octavo
from ...zoo.toy import Call

AMPLE_MEMORY = ("--memory", "1024GiB")


def files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a checkpoint without the report, which holds times, and the manifest, which holds the
    report's digest."""
    paths = (file for file in folder.rglob("*") if file.is_file() and file.name not in ("report.json", MANIFEST))
    return {str(file.relative_to(folder)): file.read_bytes() for file in paths}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--accuracy", "plain", "--dtype", "bfloat16"),
        ("--accuracy", "balanced", "--samples", "4"),
        ("--weight-only",),
        ("--format", "diffusers,torchao", "--max-shard-size", "40KB"),
    ],
)
def test_the_checkpoint_is_the_same_to_the_last_byte(options, captured, checkpoint, tmp_path):
    output = octavo("calibrate", captured, tmp_path / "b", *options, *AMPLE_MEMORY)
    assert "layers in 8-bit integers" in output
    blockwise, whole = files(tmp_path / "b"), files(checkpoint(*options))
    if "diffusers,torchao" in options:  # blockwise calibration measures the output before it folds smoothing factors
        blockwise.pop("report.html")
        whole.pop("report.html")
    assert whole == blockwise
    if "--max-shard-size" in options:
        shards = [name for name in blockwise if re.fullmatch(r"(torchao/)?diffusion_.*-of-.*\.safetensors", name)]
        assert len(shards) > 4
        assert all(len(blockwise[name]) < 80_000 for name in shards)
        assert {"diffusion_pytorch_model.safetensors.index.json", "config.json"} < blockwise.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]  # no temporary files are left
    octavo("inspect", tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "code", "fact"),
    [
        (("--memory", "1MiB"), 7, r"is needed \(.* in use, .* outside the blocks, .* for a block\)"),
        (("--memory", "much"), 2, r"is not a size\. Write a number and a unit \(B, KB"),
        (("--memory", "1024GiB", "--budget", "40%"), 2, "--memory: --budget needs the whole model"),
        (("--max-shard-size", "large"), 2, "--max-shard-size: 'large' is not a size"),
        (("--memory", "1024GiB", "--pipeline", "cnn"), 2, "--memory does not work with --pipeline cnn. Remove it."),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options, code, fact, captured, tmp_path):
    lines = octavo("calibrate", captured, tmp_path / "a", *options, code=code).splitlines()
    assert len(lines) == len(errors("\n".join(lines))) == 1
    assert re.search(fact, lines[0])
    assert not list(tmp_path.iterdir())


def test_another_model_than_the_captured_one_is_refused(captured, tiny_model, tmp_path):
    other = tmp_path / "model"
    pipe = load_pipeline(tiny_model)
    with torch.no_grad():
        pipe.transformer.proj_out.bias += 1
    pipe.save_pretrained(other)
    output = octavo("calibrate", captured, tmp_path / "a", "--model", other, *AMPLE_MEMORY, code=4)
    assert "rev" in errors(output)[0]
    octavo("calibrate", captured, tmp_path / "a", "--model", other, "--allow-revision", *AMPLE_MEMORY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_several_dtypes_are_those_of_the_pipeline(dtype, tiny_model, tmp_path):
    pipe = load_pipeline(tiny_model)
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    stored = {key: x if "pos_embed" in key else x.bfloat16() for key, x in load_file(file).items()}
    save_file(stored, file, {"format": "pt"})
    whole = load_pipeline(tmp_path, dtype=dtype).transformer
    alone = mapped_denoiser(tmp_path, "transformer", GENERIC, dtype=dtype)
    brought = alone.to(dtype)  # the cast that every block gets when it is read
    assert fingerprint(brought) == fingerprint(whole)


def test_one_block_at_a_time_is_in_memory(tiny_model, tmp_path):
    model = mapped_denoiser(tiny_model, "transformer", SD3)
    assert isinstance(model, SD3Transformer2DModel)
    blocks = list(model.transformer_blocks)
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 7, 64),
        "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([500.0]),
    }  # fmt: skip
    residency: list[list[bool]] = []

    def in_memory(block: torch.nn.Module) -> bool:
        return any(x.untyped_storage().resizable() for x in block.parameters())

    for block in blocks:
        block.register_forward_hook(lambda *_: residency.append([in_memory(other) for other in blocks]))
    samples = [Call((), {key: x.double() for key, x in inputs.items()})]
    settings = Settings(defaults=SD3.keep_float, release=True)
    work = BlockwiseCalibration(
        model, lambda: samples, settings, directory=tmp_path, limit=1 << 40, cast=lambda x: x.to(torch.float64)
    )
    work.run()
    assert {tuple(row) for row in residency[:-2]} == {(True, False), (False, True)}
    assert not any(map(in_memory, blocks))  # the calibrated blocks are in files too
