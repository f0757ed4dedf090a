"""Checks with which arguments the Open-Sora pipeline calls its transformer, and what the pipeline returns."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from octavo.pipelines.opensora import OpenSoraPipeline, OpenSoraPipelineOutput, RFlowScheduler

from ...helpers.refusals import refused
from ...zoo.opensora import CAPTION_CHANNELS, CAPTION_LENGTH, SMALL, tiny_pipeline, tiny_transformer


def run(pipe: OpenSoraPipeline, prompt: Any = "a cat", seed: int = 0, **changes: Any) -> Any:
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **{**SMALL, **changes}).frames


def two(pipe: OpenSoraPipeline, prompt: str, seed: int) -> Any:
    """Returns the videos of another prompt and of "a cat" with seed 0, run as one batch."""
    generators = [torch.Generator().manual_seed(number) for number in (seed, 0)]
    return pipe([prompt, "a cat"], generator=generators, **SMALL).frames


def transformer_calls(pipe: OpenSoraPipeline, *args: Any, **changes: Any) -> list[tuple[tuple, dict]]:
    """Runs the pipeline and returns the arguments of each call of its transformer."""
    calls: list[tuple[tuple, dict]] = []
    with pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True):
        run(pipe, *args, **changes)
    return calls


def test_the_transformer_is_called_as_the_official_script_calls_it() -> None:
    calls = transformer_calls(tiny_pipeline(dtype=torch.bfloat16), ["a cat", "a small dog"])
    assert len(calls) == SMALL["num_inference_steps"]
    for (x, timestep), kwargs in calls:
        assert set(kwargs) == {"y", "mask", "height", "width", "num_frames", "ar", "fps", "x_mask"}
        assert (x.shape, x.dtype) == ((4, 4, 5, 5, 6), torch.float32)
        assert (timestep.shape, timestep.dtype) == ((4,), torch.float32)
        assert (kwargs["y"].shape, kwargs["y"].dtype) == ((4, 1, CAPTION_LENGTH, CAPTION_CHANNELS), torch.float32)
        assert (kwargs["mask"].shape, kwargs["mask"].dtype) == ((2, CAPTION_LENGTH), torch.int64)
        assert (kwargs["x_mask"].shape, kwargs["x_mask"].all().item()) == ((4, 5), True)
        assert {kwargs[n].dtype for n in ("height", "width", "num_frames", "ar", "fps")} == {torch.bfloat16}
        assert kwargs["fps"].tolist() == [24.0, 24.0]
    assert calls[0][1]["y"] is calls[-1][1]["y"]


def test_null_rows_are_the_null_caption() -> None:
    pipe = tiny_pipeline()
    (_, kwargs), *_ = transformer_calls(pipe, ["a cat", "a dog"])
    assert torch.equal(kwargs["y"][2:, 0], pipe.transformer.y_embedder.y_embedding.expand(2, -1, -1))


def test_a_negative_prompt_brings_its_own_mask() -> None:
    (_, kwargs), *_ = transformer_calls(tiny_pipeline(), ["a cat", "a dog"], negative_prompt="blur")
    assert kwargs["mask"].shape == (4, CAPTION_LENGTH)
    assert kwargs["mask"].sum(1).tolist() == [CAPTION_LENGTH, CAPTION_LENGTH, 5, 5]


def test_without_guidance_only_prompt_rows_are_run() -> None:
    ((x, _), kwargs), *_ = transformer_calls(tiny_pipeline(), guidance_scale=1.0)
    assert len(x) == len(kwargs["y"]) == len(kwargs["x_mask"]) == 1


def test_an_image_is_one_frame_at_its_own_rate() -> None:
    pipe = tiny_pipeline()
    ((x, _), kwargs), *_ = transformer_calls(pipe, num_frames="image")
    assert x.shape[2] == 1
    assert kwargs["fps"].tolist() == [120.0]


def test_half_precision_keeps_finite_times() -> None:
    calls = transformer_calls(
        tiny_pipeline(dtype=torch.float16), resolution="240p", num_frames=1, height=240, width=426
    )
    assert all(timestep.isfinite().all() for (_, timestep), _ in calls)


def test_the_same_seed_gives_the_same_video_and_rows_do_not_meet() -> None:
    pipe = tiny_pipeline()
    first = run(pipe)
    assert torch.equal(first, run(pipe))
    assert not torch.equal(first, run(pipe, seed=1))
    pairs = [two(pipe, "a small dog", 3), two(pipe, "a large cow", 4)]
    assert torch.equal(pairs[0][1], pairs[1][1])
    assert not torch.equal(pairs[0][0], pairs[1][0])


def test_a_row_of_two_is_the_video_of_its_prompt_alone() -> None:
    """Runs in float64, because sums over two rows may be added in another order than sums over one, depending on
    threads."""
    pipe = tiny_pipeline(dtype=torch.float64)
    assert torch.allclose(two(pipe, "a small dog", 3)[1:], run(pipe), rtol=0, atol=1e-12)


def test_embeddings_take_the_place_of_the_prompt() -> None:
    pipe = tiny_pipeline()
    (_, kwargs), *_ = transformer_calls(pipe)
    bare = OpenSoraPipeline(pipe.transformer, RFlowScheduler())
    bare.set_progress_bar_config(disable=True)
    again = run(bare, None, prompt_embeds=kwargs["y"][:1], prompt_attention_mask=kwargs["mask"])
    assert torch.equal(again, run(pipe))


def test_reference_frames_come_out_as_they_went_in() -> None:
    reference = torch.randn(4, 5, 5, 6)
    pipe = tiny_pipeline()
    calls = transformer_calls(pipe, references=[[reference]], mask_strategy="0,0,0,0,2,0")
    assert calls[0][1]["x_mask"][0].tolist() == [False, False, True, True, True]
    out = run(pipe, references=[[reference]], mask_strategy="0,0,0,0,2,0")
    assert torch.equal(out[0, :, :2], reference[:, :2])


def test_a_callback_sees_every_step_and_may_change_the_latents() -> None:
    pipe = tiny_pipeline()
    steps: list[tuple[int, float]] = []

    def clear(pipe: OpenSoraPipeline, index: int, t: torch.Tensor, values: dict) -> dict:
        steps.append((index, float(t)))
        return {"latents": torch.zeros_like(values["latents"])}

    assert not run(pipe, callback_on_step_end=clear).any()
    assert [index for index, _ in steps] == [0, 1, 2]
    assert [t for _, t in steps] == pipe.scheduler.timesteps[:, 0].tolist()


def test_interrupting_leaves_out_the_remaining_steps() -> None:
    pipe = tiny_pipeline()

    def stop(pipe: OpenSoraPipeline, index: int, t: torch.Tensor, values: dict) -> dict:
        pipe._interrupt = True
        return {}

    assert len(transformer_calls(pipe, callback_on_step_end=stop)) == 1
    assert len(transformer_calls(pipe)) == 3


def test_pictures_in_every_form() -> None:
    pipe = tiny_pipeline(vae=True)
    arrays = run(pipe, output_type="np")
    assert isinstance(arrays, np.ndarray)
    assert arrays.shape == (1, 5, 40, 48, 3)
    pictures = run(pipe, output_type="pil")
    assert [len(video) for video in pictures] == [5]
    assert pictures[0][0].size == (48, 40)
    assert np.abs(np.asarray(pictures[0][2]) / 255 - arrays[0, 2]).max() < 0.01


def test_outputs_are_those_of_diffusers() -> None:
    pipe = tiny_pipeline()
    out = pipe("a cat", **SMALL)
    assert isinstance(out, OpenSoraPipelineOutput)
    assert out[0] is out.frames
    assert isinstance(pipe("a cat", **SMALL, return_dict=False), tuple)


REFUSED: dict[str, tuple[dict, str]] = {
    "no vae": ({"output_type": "pil"}, "vae"),
    "unknown form": ({"output_type": "gif"}, "output_type"),
    "unknown size": ({"height": None, "width": None, "resolution": "250p"}, "resolution"),
    "half a size": ({"width": None}, "height, width"),
    "no latent": ({"height": 4}, "size: 4x50"),
    "too few frames": ({"num_frames": 8}, "frames"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps"),
    "no prompt": ({"prompt": None}, "prompt"),
    "empty list": ({"prompt": []}, "prompt"),
    "embeds without mask": ({"prompt": None, "prompt_embeds": torch.zeros(1, 1, 20, 16)}, "prompt_embeds"),
    "negatives that do not match": ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 2, 2, 2)}, "latents"),
    "unknown tensors": ({"callback_on_step_end_tensor_inputs": ["y"]}, "callback_on_step_end_tensor_inputs"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_run_is_named(changes: dict, message: str) -> None:
    refused(lambda: run(tiny_pipeline(), **{"prompt": "a cat", **changes}), 2, re.compile(f"^{message}"))


def test_without_text_encoder_a_prompt_is_refused() -> None:
    refused(lambda: run(OpenSoraPipeline(tiny_transformer(), RFlowScheduler())), 2, "text encoder")
