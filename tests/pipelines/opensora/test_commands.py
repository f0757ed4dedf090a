"""Checks Open-Sora through capture, calibrate, inspect and compare, and a user's own checkout through the Python
API."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from octavo import Listener
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.capture.store.reader import Capture
from octavo.pipelines.opensora import load_transformer

from ...helpers.commands import octavo
from ...zoo.opensora import SMALL, tiny_pipeline, tiny_text_encoder, tiny_tokenizer

VIDEO = ("--height", 40, "--width", 50, "--frames", 17, "--fps", 24, "--steps", 3)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a wave rolls in\na much longer caption, which takes more tokens than the first one did")
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opensora") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_capture_calibrate_inspect(model, prompts, tmp_path):
    octavo("capture", model, tmp_path / "captured", "--pipeline", "opensora", "--prompts", prompts, *VIDEO)
    calls = list(Capture.open(tmp_path / "captured").calls())
    assert len(calls) == 6
    assert {"x", "timestep", "y", "mask", "x_mask", "fps", "height", "width"} <= set(calls[0].kwargs)
    assert [call.step for call in calls] == [0, 1, 2] * 2
    output = octavo("calibrate", tmp_path / "captured", tmp_path / "out")
    assert "outside the blocks" in output
    layers = load_ascend(tmp_path / "out")
    transformer = load_transformer(model / "transformer")
    blocks = {n for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and "_blocks." in n}
    assert set(layers) == blocks
    official = set(transformer.state_dict())
    stored = load_file(tmp_path / "out" / "quant_model_weight_w8a8.safetensors")
    named = {name for name in stored if name.endswith((".weight", ".bias"))}
    assert {
        name.replace(".linear.", ".") for name in named - official
    } <= official  # a layer with a smoothing multiplier stores its parameters as X.linear
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["totals"]["output_sqnr"] > 20
    octavo("inspect", tmp_path / "captured")
    octavo("inspect", tmp_path / "out")
    page = tmp_path / "report.html"
    output = octavo(
        "compare", model, tmp_path / "out", "--prompts", prompts, "--limit", 1, *VIDEO, "-o", page, "--json"
    )
    done = json.loads(next(line for line in output.splitlines() if '"event": "done"' in line))
    assert done["settings"]["fps"] == 24
    assert page.is_file()


def test_a_folder_of_the_transformer_alone_with_a_text_encoder_beside(prompts, tmp_path):
    pipe = tiny_pipeline()
    pipe.transformer.save_pretrained(tmp_path / "stdit")
    (tmp_path / "t5").mkdir()
    tiny_text_encoder().save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    command = ("capture", tmp_path / "stdit", tmp_path / "captured", "--prompts", prompts, *VIDEO)
    assert "no text encoder" in octavo(*command, code=2)
    octavo(*command, "--resume", "--text-encoder", tmp_path / "t5")
    octavo("calibrate", tmp_path / "captured", tmp_path / "out")


def test_the_documented_recipe_on_our_own_transformer(prompts, tmp_path):
    from octavo import Calibrator, QuantConfig

    pipe = tiny_pipeline()
    with Listener(pipe.transformer) as listener:
        pipe("a wave rolls in", **SMALL)
        pipe("a longer caption of a river that bends", **SMALL)
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    quant_config = QuantConfig(
        w_bit=8, a_bit=8, w_signed=True, a_signed=True, w_sym=True, a_sym=False, act_quant=True, act_method=1,
        quant_mode=1, disable_names=None, amp_num=0, keep_acc=None, sigma=25, device="cpu",
    )  # fmt: skip
    calibrator = Calibrator(pipe.transformer, quant_config, listener.inputs)
    calibrator.run()
    calibrator.export_quant_safetensor(str(tmp_path / "out"))
    modules = pipe.transformer.named_modules()
    assert set(load_ascend(tmp_path / "out")) == {n for n, m in modules if isinstance(m, nn.Linear) and "_blocks." in n}
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())


class Own(nn.Module):
    """A module with the signature of a user's own checkout: x and timestep positional, all others by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)])
        self.final_layer = nn.Linear(8, 8)

    def forward(self, x, timestep, y, mask=None, x_mask=None, fps=None, height=None, width=None, **kwargs):
        tokens = x.flatten(2).transpose(1, 2)  # (rows, tokens, 8)
        for block in self.blocks:
            tokens = tokens + block(tokens) + y.mean() + timestep.view(-1, 1, 1) / 1000
        return self.final_layer(tokens).transpose(1, 2).view_as(x)


def sampled(model: nn.Module, frames: int) -> torch.Tensor:
    """Samples as a checkout does: both guidance halves in one call, latents changed in place."""
    z = torch.randn(1, 8, frames, 4, 4, generator=torch.Generator().manual_seed(frames))
    sizes = dict(fps=torch.tensor([24.0]), height=torch.tensor([32.0]), width=torch.tensor([32.0]))
    with torch.no_grad():
        for time in (900.0, 500.0, 100.0):
            x = torch.cat([z, z])
            mask = torch.ones(1, frames, dtype=torch.bool)
            both = model(x, torch.full((2,), time), y=torch.ones(2, 1, 3, 4), mask=None, x_mask=mask, **sizes)
            cond, uncond = both.chunk(2)
            z.add_(uncond + 7.0 * (cond - uncond), alpha=-0.3)
    return z


def test_a_users_own_checkout(tmp_path):
    model = Own()
    with Listener(model, tmp_path / "captured"):
        sampled(model, 2)
        sampled(model, 3)
    calls = list(Capture.open(tmp_path / "captured").calls())
    assert [tuple(call.kwargs["x"].shape) for call in calls] == [(2, 8, 2, 4, 4)] * 3 + [(2, 8, 3, 4, 4)] * 3
    assert all(set(c.kwargs) == {"x", "timestep", "y", "mask", "x_mask", "fps", "height", "width"} for c in calls)
    from octavo import Calibrator, QuantConfig

    quant_config = QuantConfig(
        w_bit=8, a_bit=8, w_signed=True, a_signed=True, w_sym=True, a_sym=False, act_quant=True, act_method=1,
        quant_mode=1, disable_names=["final_layer"], amp_num=0, keep_acc=None, sigma=25, device="cpu",
    )  # fmt: skip
    calibrator = Calibrator(model, quant_config, [call.kwargs for call in calls])
    calibrator.run()
    calibrator.export_quant_safetensor(str(tmp_path / "out"))
    assert len(load_ascend(tmp_path / "out")) == 4


def test_a_run_of_51_frames_at_240p_takes_34_mb_at_most(tmp_path):
    class Silent(nn.Module):
        def forward(self, x, timestep, **conditions):
            return x

    model, generator = Silent(), torch.Generator().manual_seed(0)
    caption = torch.randn(1, 1, 300, 4096, generator=generator)
    null = torch.randn(1, 1, 300, 4096, generator=generator)
    z = torch.randn(1, 4, 15, 30, 53, generator=generator)
    with Listener(model, tmp_path / "captured"):
        for step in range(30):
            model(torch.cat([z, z]), torch.full((2,), 1000.0 - step), y=torch.cat([caption, null]),
                  mask=torch.ones(1, 300, dtype=torch.long), x_mask=torch.ones(1, 15, dtype=torch.bool),
                  fps=torch.tensor([24.0]), height=torch.tensor([240.0]), width=torch.tensor([426.0]))  # fmt: skip
            z = torch.randn(z.shape, generator=generator)
    unit = Capture.open(tmp_path / "captured").units[0]
    assert unit.raw_bytes > 310e6
    on_disk = sum(file.stat().st_size for file in (tmp_path / "captured").rglob("*") if file.is_file())
    assert on_disk <= 34e6, on_disk
