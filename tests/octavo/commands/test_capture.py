"""Checks what `octavo capture` stores, what it refuses, and how it ends."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.nn.modules.module import register_module_forward_pre_hook

from octavo.capture.store.reader import Capture
from octavo.cli import main
from octavo.pipelines.load import load_pipeline

from ...helpers.commands import capture, errors, octavo
from ...helpers.faults import in_child
from ...helpers.ranked import printing

PROMPTS = ["a red circle", "a blue ring", "a white cross"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


def units(out: Path) -> dict[str, str]:
    return {unit.name: unit.digest for unit in Capture.open(out, allow_incomplete=True).units}


def test_two_runs_store_the_same_calls_and_every_step_of_every_prompt(tiny_model, tmp_path, prompts):
    output = capture(tiny_model, tmp_path / "a", prompts)
    assert "3 prompts, 9 calls" in output
    assert "2 more prompts will take about" in output
    capture(tiny_model, tmp_path / "b", prompts)
    assert units(tmp_path / "a") == units(tmp_path / "b")
    stored = Capture.open(tmp_path / "a")
    assert [unit.info["prompt"] for unit in stored.units] == PROMPTS
    assert [(call.index, call.step) for call in stored.calls()] == [(0, 0), (1, 1), (2, 2)] * 3


def test_the_stored_calls_are_those_of_the_pipeline(tiny_model, tmp_path, prompts):
    capture(tiny_model, tmp_path / "a", prompts, "--limit", 1)
    pipe = load_pipeline(tiny_model)
    latents = []
    pipe.transformer.register_forward_pre_hook(
        lambda m, a, kwargs: latents.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    seed = Capture.open(tmp_path / "a").units[0].info["seed"]
    pipe(PROMPTS[0], height=16, width=16, num_inference_steps=3, generator=torch.Generator().manual_seed(seed))
    stored = [call.kwargs["hidden_states"] for call in Capture.open(tmp_path / "a").calls()]
    assert all(torch.equal(a, b) for a, b in zip(latents, stored, strict=True))


def test_an_interrupted_and_resumed_capture_is_the_same(tiny_model, tmp_path, prompts):
    capture(tiny_model, tmp_path / "whole", prompts)
    capture(tiny_model, tmp_path / "parts", prompts, "--limit", 1)
    capture(tiny_model, tmp_path / "parts", prompts, "--resume")
    assert units(tmp_path / "whole") == units(tmp_path / "parts")


def test_keep_drop_and_pth(tiny_model, tmp_path, prompts):
    pth = tmp_path / "calls.pth"
    capture(tiny_model, tmp_path / "a", prompts, "--keep", "spread:2", "--drop-input", "return_dict", "--pth", pth)
    calls = list(Capture.open(tmp_path / "a").calls())
    assert [call.step for call in calls] == [0, 2] * 3
    assert not any("return_dict" in call.kwargs for call in calls)
    from octavo import safe_torch_load

    listed = safe_torch_load(pth, map_location="cpu")
    assert all(torch.equal(a["hidden_states"], b.kwargs["hidden_states"]) for a, b in zip(listed, calls, strict=True))


@pytest.fixture
def editing(tiny_model: Path, tmp_path: Path) -> Path:
    """Writes `tiny_model` as a pipeline that edits a picture. With strength 0.5 it runs 5 of 10 steps."""
    from diffusers import StableDiffusion3Img2ImgPipeline

    StableDiffusion3Img2ImgPipeline(**load_pipeline(tiny_model).components).save_pretrained(tmp_path / "editing")
    return tmp_path / "editing"


def test_spread_counts_the_steps_that_run(editing, tmp_path, prompts):
    from PIL import Image

    Image.new("RGB", (16, 16), (200, 40, 40)).save(tmp_path / "in.png")
    edit = ("--steps", 10, "--arg", f"image={tmp_path / 'in.png'}", "--arg", "strength=0.5", "--limit", 2)
    capture(editing, tmp_path / "all", prompts, *edit)
    capture(editing, tmp_path / "kept", prompts, *edit, "--keep", "spread:3")
    levels = {name: [call.timestep for call in Capture.open(tmp_path / name).calls()] for name in ("all", "kept")}
    assert levels["kept"] == [levels["all"][index] for index in (0, 2, 4, 5, 7, 9)]
    output = capture(editing, tmp_path / "more", prompts, *edit, "--keep", "spread:7")
    assert "--keep spread:7: a prompt took only 5 steps; all of them are stored." in output
    assert len(list(Capture.open(tmp_path / "more").calls())) == 10


def test_a_pipeline_that_announces_nothing_is_run_again_to_keep_its_last_step(tmp_path, prompts):
    from ...zoo.pipelines import make

    pipe = make("ddpm")[0]  # takes no callback and does not announce its number of steps
    pipe.save_pretrained(tmp_path / "ddpm")
    more = ("--prompts", prompts, "--limit", 1, "--arg", 'output_type="np"', "--keep", "spread:2")
    octavo("capture", tmp_path / "ddpm", tmp_path / "a", *more, "--steps", 5)
    (one,) = Capture.open(tmp_path / "a").units
    assert [call.index for call in one.calls] == [0, 4]


def test_json_is_one_object_a_line_and_ends_with_done(tiny_model, tmp_path, prompts):
    output = capture(tiny_model, tmp_path / "a", prompts, "--json")
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [event["event"] for event in events] == ["prompt", "estimate", "prompt", "prompt", "done"]
    assert events[-1]["calls"] == 9
    assert events[-1]["raw_bytes"] > events[-1]["stored_bytes"] > 0


def test_a_capture_is_not_overwritten(tiny_model, tmp_path, prompts):
    capture(tiny_model, tmp_path / "a", prompts)
    before = units(tmp_path / "a")
    assert "holds a capture (3 of 3 prompts). Use --resume" in capture(tiny_model, tmp_path / "a", prompts, code=5)
    assert units(tmp_path / "a") == before


def test_directories_that_are_no_captures_and_files_are_not_touched(tiny_model, tmp_path, prompts):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "found x" in capture(tiny_model, tmp_path / "full", prompts, code=5)
    (tmp_path / "file").touch()
    assert "not a directory" in capture(tiny_model, tmp_path / "file", prompts, code=5)


def test_prompts_may_be_added_on_resuming_and_removed_ones_kept(tiny_model, tmp_path, prompts):
    assert "no such prompts file" in capture(tiny_model, tmp_path / "a", tmp_path / "none.txt", code=2)
    capture(tiny_model, tmp_path / "a", prompts)
    prompts.write_text("\n".join([PROMPTS[0], "a green square", PROMPTS[2]]))
    output = capture(tiny_model, tmp_path / "a", prompts, "--resume", code=4)
    assert "no longer has 1 of the captured prompts. Use --keep-removed" in output
    capture(tiny_model, tmp_path / "a", prompts, "--resume", "--keep-removed")
    stored = [unit.info["prompt"] for unit in Capture.open(tmp_path / "a").units]
    assert sorted(stored) == sorted([*PROMPTS, "a green square"])


def test_repeated_and_long_prompts_are_warned_of(tiny_model, tmp_path, prompts):
    prompts.write_text(f"{PROMPTS[0]}\n{PROMPTS[0]}\n{'red ' * 40}")
    output = capture(tiny_model, tmp_path / "a", prompts)
    assert "line 2 repeats line 1; captured once" in output
    assert "1 of 2 prompts are longer than the 20 tokens" in output
    assert "longer than" not in capture(tiny_model, tmp_path / "b", prompts, "--limit", 1)


def test_the_libraries_do_not_repeat_that_a_prompt_is_too_long(tiny_model, tmp_path, prompts):
    import logging

    messages = []

    class Listening(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    prompts.write_text("\n".join(f"{'red ' * 40}{number}" for number in range(2)))
    handlers = {logging.getLogger(name): Listening() for name in ("diffusers", "transformers")}
    for logger, handler in handlers.items():
        logger.addHandler(handler)
    try:
        output = capture(tiny_model, tmp_path / "a", prompts)
        assert output.count("longer than") == 1
        assert not messages
        load_pipeline(tiny_model)("red " * 40, height=16, width=16, num_inference_steps=1)
        assert any("can only handle sequences up to 20 tokens" in line for line in messages)
    finally:
        for logger, handler in handlers.items():
            logger.removeHandler(handler)


def test_resume_with_other_settings_is_refused(tiny_model, tmp_path, prompts):
    capture(tiny_model, tmp_path / "a", prompts, "--limit", 1)
    output = capture(tiny_model, tmp_path / "a", prompts, "--resume", "--guidance-scale", 3, code=4)
    assert "guidance_scale" in output


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--arg", "nonsense=1"), 2, "takes no argument nonsense"),
        (("--arg", "nonsense"), 2, "not of the form NAME=VALUE"),
        (("--component", "unet"), 2, "no module 'unet'"),
        (("--component", "vae", "--arg", 'output_type="latent"'), 4, "prompt 1: the pipeline never called vae"),
        (("--keep", "some"), 2, "not a rule"),
        (("--device", "npu"), 7, "torch_npu is not installed"),
        (("--height", 3), 1, "prompt 1: ValueError"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tiny_model, tmp_path, prompts, more, code, words):
    output = capture(tiny_model, tmp_path / "a", prompts, *more, code=code)
    assert len(errors(output)) == 1
    assert words in errors(output)[0]
    assert not list((tmp_path / "a").glob("units/*"))


def test_numbers_that_are_not_finite_are_refused_or_skipped(tiny_model, tmp_path, prompts):
    import shutil

    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_model, tmp_path / "model")
    file = model / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["text_projection.weight"].fill_(float("inf"))
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})
    output = capture(model, tmp_path / "a", prompts, code=6)
    assert "prompt 1 step 0: pooled_projections has" in output
    assert "values that are NaN or Inf, perhaps from a float16 overflow" in output
    assert "unit 0: has no calls" in capture(model, tmp_path / "b", prompts, "--nonfinite", "skip", code=4)


def test_a_prompt_that_fails_is_dropped_and_the_others_go_on(tiny_model, tmp_path, prompts):
    from torch.nn.modules.module import register_module_forward_pre_hook
    from transformers import CLIPTextModelWithProjection

    matches = []

    def fail(module, args):
        matches.append(isinstance(module, CLIPTextModelWithProjection))
        if sum(matches) == 9 and matches[-1]:  # the first encoder of the third prompt
            raise RuntimeError("broken. Really")

    handle = register_module_forward_pre_hook(fail)
    try:
        output = capture(tiny_model, tmp_path / "a", prompts, "--keep-going", code=1)
    finally:
        handle.remove()
    assert "prompt 3: RuntimeError: broken" in output
    assert "1 prompt failed" in output
    assert [u.info["prompt"] for u in Capture.open(tmp_path / "a", allow_incomplete=True).units] == PROMPTS[:2]
    capture(tiny_model, tmp_path / "a", prompts, "--resume")
    assert len(Capture.open(tmp_path / "a").units) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_within_a_step_and_leave_whole_prompts(tiny_model, tmp_path, capfd, number, code):
    many = tmp_path / "many.txt"
    many.write_text("\n".join(f"{p} {i}" for i in range(300) for p in PROMPTS))
    out = tmp_path / "out"

    def interrupted() -> None:
        steps = 0

        def hook(called: torch.nn.Module, args: object) -> None:
            nonlocal steps
            steps += isinstance(called, SD3Transformer2DModel)
            if steps == 5 and isinstance(called, SD3Transformer2DModel):  # in the second prompt
                os.kill(os.getpid(), number)

        register_module_forward_pre_hook(hook)
        small = ("--steps", 3, "--height", 16, "--width", 16)
        printing("capture", tiny_model, out, "--prompts", many, "--json", *small)

    assert in_child(interrupted) == code
    output, notes = capfd.readouterr()
    assert "1 of 900 prompts are stored. Run again with --resume." in notes
    assert "Traceback" not in notes
    assert [json.loads(line)["event"] for line in output.splitlines()].count("prompt") == 1
    stored = Capture.open(out, allow_incomplete=True)
    assert len(stored.units) == 1
    stored.verify()
    assert not list((out / "units").glob(".*"))


def test_a_closed_stdout_prints_no_traceback(tiny_model, tmp_path, prompts, capfd):
    def gone() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        arguments = ["capture", tiny_model, tmp_path / "a", "--prompts", prompts, "--steps", 2]
        main([str(word) for word in [*arguments, "--height", 16, "--width", 16]])

    assert in_child(gone) == 128 + signal.SIGPIPE
    assert "Traceback" not in capfd.readouterr().err


def test_inspect_shows_a_capture_and_finds_damage(tiny_model, tmp_path, prompts):
    capture(tiny_model, tmp_path / "a", prompts)
    output = octavo("inspect", tmp_path / "a")
    for words in ("StableDiffusion3Pipeline", "3 of 3", "hidden_states", "float32 (2, 4, 8, 8)", "all digests match"):
        assert words in output
    report = json.loads(octavo("inspect", tmp_path / "a", "--json"))
    assert report["sound"] is True
    assert report["components"]["transformer"]["calls"] == 9
    data = next((tmp_path / "a" / "units").glob("*/data-000.safetensors"))
    damaged = bytearray(data.read_bytes())
    damaged[-5] ^= 1
    data.chmod(0o600)
    data.write_bytes(damaged)
    assert "damaged (checksum)" in octavo("inspect", tmp_path / "a", code=3)
    assert "no such directory" in octavo("inspect", tmp_path / "none", code=2)


def test_a_directory_without_calls_takes_the_corrected_command(tiny_model, tmp_path, prompts):
    capture(tiny_model, tmp_path / "a", prompts, "--height", 3, code=1)
    capture(tiny_model, tmp_path / "a", prompts, "--limit", 1)
    capture(tiny_model, tmp_path / "b", prompts, "--height", 3, code=1)
    capture(tiny_model, tmp_path / "b", prompts, "--limit", 1, "--resume")
    assert units(tmp_path / "a") == units(tmp_path / "b")
    assert "holds a capture (1 of 1 prompts)" in capture(tiny_model, tmp_path / "a", prompts, code=5)


def test_only_prompts_that_run_are_counted_as_long(tiny_model, tmp_path, prompts):
    prompts.write_text("\n".join([PROMPTS[0], *(f"{number} {'red ' * 40}" for number in range(3))]))
    assert "1 of 2 prompts are longer" in capture(tiny_model, tmp_path / "a", prompts, "--limit", 2)
    assert "are longer" not in capture(tiny_model, tmp_path / "b", prompts, "--limit", 1)


def test_embeddings_are_known_by_their_content_when_resuming(tiny_model, tmp_path, prompts):
    from safetensors.torch import save_file

    file = tmp_path / "embeddings.safetensors"
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    pipe = load_pipeline(tiny_model)
    with torch.no_grad():
        rows = [pipe.encode_prompt(text, None, None) for text in PROMPTS]
    save_file({name: torch.cat(parts) for name, *parts in zip(names, *rows, strict=True)}, file)
    options = [word for name in names for word in ("--arg", f"{name}={file}")]
    capture(tiny_model, tmp_path / "a", prompts, "--limit", 1, *options)
    capture(tiny_model, tmp_path / "a", prompts, "--resume", *options)
    capture(tiny_model, tmp_path / "text", prompts)
    stored, wanted = (list(Capture.open(tmp_path / name).calls()) for name in ("a", "text"))
    assert len(stored) == len(wanted) == 9
    for one, other in zip(stored, wanted, strict=True):
        assert torch.allclose(one.kwargs["encoder_hidden_states"], other.kwargs["encoder_hidden_states"], atol=1e-5)
    save_file({name: torch.cat(parts) * 2 for name, *parts in zip(names, *rows, strict=True)}, file)
    output = capture(tiny_model, tmp_path / "a", prompts, "--resume", *options, code=4)
    assert "captured with settings.arguments." in output
