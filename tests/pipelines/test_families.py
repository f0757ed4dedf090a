"""The table of families: which one a pipeline is of, what stays float, and inputs that are divided without a trace."""

import json

import pytest
import torch

from octavo.calibrate.plan import make_plan
from octavo.calibrate.settings import Settings
from octavo.capture.recorder import Memory, Recorder, copied
from octavo.pipelines import FAMILIES, GENERIC, family_of
from octavo.pipelines.denoisers import denoisers

from ..helpers.commands import octavo
from ..zoo.exported_sd3 import integer_layers
from ..zoo.folding import fold
from ..zoo.pipelines import make, run
from ..zoo.whole_wan import WAN, whole_wan

OF = {
    "flux-dev": "flux", "flux2": "flux2", "wan21": "wan", "wan-vace": "wan", "hunyuan-video": "hunyuanvideo",
    "qwen-image": "qwenimage", "pixart-sigma": "pixart", "sana": "sana", "cogvideox": "cogvideox", "ltx": "ltx",
    "sdxl": "sdxl", "sd35": "sd3", "sd15": "generic",
}  # fmt: skip
DIVIDED = [name for name, family in OF.items() if (FAMILIES | {"generic": GENERIC})[family].groups]


def denoiser(name):
    pipe, arguments = make(name)
    return pipe, arguments, next(iter(denoisers(pipe).values())).requires_grad_(False)


@pytest.mark.parametrize("name", OF)
def test_each_pipeline_has_its_family_and_quantizes_more_than_half_of_the_blocks(name):
    pipe, _, module = denoiser(name)
    family = family_of(type(pipe).__name__)
    assert family.name == OF[name]
    plan = make_plan(module, defaults=family.keep_float, more=family.more_float)
    inside = [entry for entry in plan.entries if "blocks" in entry.name and "norm" not in entry.name]
    assert len(plan.quantized) > len(inside) / 2
    for pattern in family.more_float:
        assert not any(pattern.removeprefix("*.") in entry for entry in plan.quantized)


@pytest.mark.parametrize("name", DIVIDED)
def test_what_a_family_says_can_be_divided_is_divided_without_a_trace(name):
    pipe, arguments, module = denoiser(name)
    found = family_of(type(pipe).__name__).groups(module)
    assert found
    memory = Memory()
    with Recorder(module, memory):
        run(pipe, arguments)
    call = memory.calls[0]
    before = output(module.double(), call)
    generator = torch.Generator().manual_seed(0)
    widths = [module.get_submodule(group.layers[0]).in_features for group in found]
    factors = [torch.exp2(4 * torch.rand(width, generator=generator) - 2) for width in widths]
    fold(module, list(zip(found, factors, strict=True)))
    after = output(module, call)
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def output(module, call):
    def double(value):
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: double(each) for key, each in value.items()}
        return type(value)(map(double, value)) if type(value) in (list, tuple) else value

    with torch.no_grad():
        return module(*double(copied(call.args)), **double(copied(call.kwargs)) | {"return_dict": False})[0]


def test_the_defaults_of_a_family_reach_the_settings_and_give_way():
    from octavo.commands.calibrate_options import CalibrateOptions, settings_of

    options = CalibrateOptions(capture="c", out="o", quantize_too=("*.ff.net.2",))
    settings = settings_of(options, FAMILIES["flux"], 1)
    assert isinstance(settings, Settings)
    module = denoiser("flux-dev")[2]
    plan = make_plan(module, more=settings.more_float, quantize=settings.quantize)
    assert "transformer_blocks.0.ff.net.2" in plan.quantized
    assert "transformer_blocks.0.ff_context.net.2" not in plan.quantized


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return whole_wan(tmp_path_factory.mktemp("wan") / "model")


def test_both_denoisers_of_wan_run_in_integers_after_one_capture_and_one_calibration(wan, tmp_path):
    from octavo.checkpoints import open_pipeline

    out, run = tmp_path / "o", tuple(WAN[:6])
    octavo("capture", wan, tmp_path / "captured", *WAN, "--steps", 4)
    for formats in ("ascend", "diffusers"):
        command = ("calibrate", tmp_path / "captured", out, "--accuracy", "plain", "--format", formats, "--overwrite")
        assert octavo(*command).count("20 layers in 8-bit integers") == 2
        assert sorted(path.name for path in out.iterdir()) == ["transformer", "transformer_2"]
        pipe = open_pipeline(str(out), None, None, dtype=None, device=torch.device("cpu"))
        assert [len(integer_layers(part)) for part in (pipe.transformer, pipe.transformer_2)] == [20, 20]
    steps = ("--steps", 4, "--arg", "max_sequence_length=9")
    assert "5 frames" in octavo("generate", out, "a cat", "-o", tmp_path / "frames", *run, *steps)
    assert octavo("inspect", out).count("20 W8A8") == 2
    found = octavo("compare", wan, out, *WAN, "--steps", 4, "-o", tmp_path / "r.html", "--json").splitlines()
    done = next(event for line in found if line[0] == "{" and (event := json.loads(line))["event"] == "done")
    assert done["component"] == "transformer and transformer_2"
    assert [step["step"] for step in done["totals"]["step_sqnr"]] == [1, 2, 3, 4]
    assert "no checkpoint of vae. Choose one of transformer" in octavo(
        "generate", out, "a cat", "-o", tmp_path / "x", *run, "--component", "vae", code=2
    )


def test_prompts_and_the_negative_prompt_beyond_max_sequence_length_are_counted_once(wan, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(["a b", *(f"{'a b c d ' * 4}{number}" for number in range(2))]))
    small = ("--height", 16, "--width", 16, "--frames", 5, "--steps", 1, "--arg", "max_sequence_length=9")
    said = octavo("capture", wan, tmp_path / "c", "--prompts", prompts, *small, "--negative-prompt", "x y " * 9)
    assert "2 of 3 prompts are longer than the 9 tokens of the tokenizer, which cuts off the rest." in said
    assert "The negative prompt is longer than the 9 tokens" in said
    assert said.count("truncated") == 0
    assert "longer than" not in octavo("generate", wan, "a b", *small, "-o", tmp_path / "frames")


def test_one_denoiser_of_wan_is_calibrated_alone_and_two_of_the_same_are_refused(wan, tmp_path):
    octavo("capture", wan, tmp_path / "captured", *WAN, "--steps", 4)
    for name in ("a", "b"):
        command = ("calibrate", tmp_path / "captured", tmp_path / "o" / name, "--component", "transformer_2")
        assert "20 layers in 8-bit integers" in octavo(*command, "--accuracy", "plain")
    said = octavo("generate", tmp_path / "o", "a cat", "-o", tmp_path / "x", code=2)
    assert "holds several checkpoints of transformer_2. Give one of them" in said


def test_a_denoiser_that_was_never_called_is_said_at_once(wan, tmp_path):
    said = octavo("capture", wan, tmp_path / "captured", *WAN, "--steps", 1)
    assert "transformer_2 was never called" in said
    words = "has no calls of 'transformer_2'. Capture with more --steps, or choose another with --component."
    for more in ((), ("--component", "transformer_2")):
        assert words in octavo("calibrate", tmp_path / "captured", tmp_path / "o", *more, code=4)
    assert not (tmp_path / "o").exists()


def test_a_denoiser_of_which_no_step_is_kept_is_said_at_once(wan, tmp_path):
    said = octavo("capture", wan, tmp_path / "captured", *WAN, "--steps", 4, "--keep", "spread:1")
    assert "keeps no step in which transformer_2 is called" in said
