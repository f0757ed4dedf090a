"""Pictures that the bundled pipeline draws, and the SQNR of its denoiser on held-out prompts."""

import math
from typing import Any

import numpy as np
import torch

from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.capture.recorder import Memory, Recorder
from octavo.pipelines.demo.train import CountedTokenProcessor
from octavo.pipelines.run import prompt_seed


def draw(pipe: Any, prompts: list[str], batch: int = 8, **more: Any) -> list[np.ndarray]:
    """Draws a (64, 64, 3) uint8 picture for each prompt in 28 steps, from the noise that `octavo capture` uses. `more`
    has further arguments of the pipeline."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        noise = [torch.Generator().manual_seed(prompt_seed(text, 0)) for text in some]
        images = pipe(some, generator=noise, num_inference_steps=28, output_type="np", **more).images
        pictures += list(np.rint(images * 255).astype(np.uint8))
    return pictures


def draw_quickly(pipe: Any, prompts: list[str]) -> list[np.ndarray]:
    """Draws the pictures of `draw` with the bundled pipeline in a quarter of the time: the 256 equal zero tokens of
    each prompt become one, which counts as 256 in attention. Float and integer layers compute each token by itself, so
    only the order of float sums differs."""
    before = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(CountedTokenProcessor())
    try:
        return draw(pipe, prompts, max_sequence_length=1)
    finally:
        pipe.transformer.set_attn_processor(before)


def held_out_sqnr(pipe: Any, layers: dict[str, QuantizedLayer], prompts: list[str]) -> float:
    """Returns the SQNR in dB of the quantized denoiser over all calls of the prompts."""
    signal = noise = 0.0
    for prompt in prompts:
        memory = Memory()
        with Recorder(pipe.transformer, memory):
            generator = torch.Generator().manual_seed(prompt_seed(prompt, 0))
            pipe(prompt, generator=generator, num_inference_steps=28, output_type="latent")
        with torch.no_grad():
            exact = [pipe.transformer(**call.kwargs)[0].double() for call in memory.calls]
            with quantized(pipe.transformer, layers):
                for y, call in zip(exact, memory.calls, strict=True):
                    signal += float(y.square().sum())
                    noise += float((pipe.transformer(**call.kwargs)[0].double() - y).square().sum())
    return 10 * math.log10(signal / noise)
