"""What diffusers makes of an exported directory: the same integers, the same bytes again, and refusals in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

import octavo  # noqa: F401 - it registers
from calibrate.export import export
from calibrate.layers import QuantizedLinear, quantized
from calibrate.load import load_ascend
from calibrate.run import Result
from calibrate.sqnr import outputs
from pipelines.sd3 import SD3

from .hard_tiny import Call, bits, calibrated, hard, prompts

WEIGHTS = "diffusion_pytorch_model.safetensors"
ACTIVATIONS = ("static", "timestep", "dynamic", "float")


def made(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Module, Result, list[Call]]:
    """A tiny SD3, calibrated and exported as ascend and diffusers."""
    model, calls = hard(dtype=dtype), prompts(3, 2, dtype=dtype)
    result = calibrated(model, calls, **settings)
    export(result, model, folder, ("ascend", "diffusers"), groups=SD3.groups)
    return model, result, calls


def load(folder: Path, **options: Any) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(folder, **options)


def integer_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def run(model: nn.Module, calls: list[Call]) -> Tensor:
    return torch.cat([each[0].flatten() for each in outputs(model, calls)])


def edit(folder: Path, change: Any) -> None:
    """config.json with another quantization_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.unlink()
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Result, list[Call]]:
    folder = tmp_path_factory.mktemp("plain") / "out"
    return folder, *made(folder)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_integers_are_those_that_were_evaluated_and_those_for_ascend(tmp_path, activations):
    model, result, calls = made(tmp_path / "out", activations=activations)
    loaded = load(tmp_path / "out")
    here, there = bits(integer_layers(loaded)), bits(result.layers)
    assert {name: tensor.tolist() for name, tensor in here.items()} == {n: t.tolist() for n, t in there.items()}
    ascend = bits(load_ascend(tmp_path / "out"))
    assert all(torch.equal(here[name], ascend[name]) for name in here if name.endswith((".weight", ".quant_bias")))
    with quantized(model, result.layers):
        wanted = run(model, calls)
    torch.testing.assert_close(run(loaded, calls), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path, dtype):
    made(tmp_path / "out", dtype, smoothing=True)
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again"))
    assert after.pop("_name_or_path") == str(tmp_path / "out")  # diffusers adds it to whatever it loads
    assert after == before
