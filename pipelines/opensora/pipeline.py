"""Text to video with Open-Sora 1.2, in the manner of diffusers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from octavo.capture.errors import UsageError

from .conditioning import place_references
from .decoding import check_form, decode
from .defaults import VAE_FACTOR
from .inputs import checked_frames, checked_pixels, given_embeds, listed, matched, size_arguments, starting_noise
from .sampling import Conditions, Generators, denoise_step
from .scheduler import RFlowScheduler, VideoShape
from .sizes import latent_size
from .text import clean_caption as cleaned
from .text import encode, with_scores
from .transformer import STDiT3

StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """The output of a run. `frames` is what output_type asks for: latents (n, channels, T, height, width) of n videos
    with T latent frames; an array (n, T, height, width, 3) in 0..1; or n lists of T pictures."""

    frames: Tensor | np.ndarray | list[list[PIL.Image.Image]]


class Text(NamedTuple):
    """Holds caption states (rows, 1, tokens, channels), and `mask` (rows, tokens), which is zero for tokens of padding.

    With guidance there are twice as many rows as prompts: those of the prompts, then those of the negative prompts, or
    of null captions if there are no negative prompts.
    """

    states: Tensor
    mask: Tensor


class OpenSoraPipeline(DiffusionPipeline):
    """Makes videos from prompts with Open-Sora 1.2. Without a VAE it returns latents.

    The 2-D VAE decodes latent frames one by one. Open-Sora's temporal VAE is not included, so a decoded video has one
    picture for each latent frame. Text encoder and tokenizer may be missing too: then pass prompt_embeds and
    prompt_attention_mask instead of prompts.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _optional_components = ["tokenizer", "text_encoder", "vae"]  # noqa: RUF012 - the form diffusers reads
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    transformer: STDiT3
    scheduler: RFlowScheduler
    tokenizer: PreTrainedTokenizerBase | None
    text_encoder: T5EncoderModel | None
    vae: AutoencoderKL | None

    def __init__(
        self,
        transformer: STDiT3,
        scheduler: RFlowScheduler,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: T5EncoderModel | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder, vae=vae
        )
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1) if vae is not None else VAE_FACTOR
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = 7.0
        self._interrupt = False
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """True if a callback has set `_interrupt`; the remaining steps are then left out."""
        return self._interrupt

    def encode_prompt(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None = None,
        *,
        clean_caption: bool = True,
        embeds: tuple[Tensor, Tensor] | None = None,
    ) -> Text:
        """Returns the caption states for the transformer: a row for each of `prompts`, or `embeds` (states, mask) if
        given. `clean_caption`: whether texts are cleaned first, as in training (lower case, without links and HTML).

        With guidance (guidance_scale above 1) a second row for each prompt is appended: the caption states of
        `negative_prompts`, with masks of their own. If `negative_prompts` is None, the second rows are null captions,
        each with the mask of its prompt. Raises UsageError for texts if the pipeline has no text encoder.
        """
        states, mask = self._states(prompts, clean_caption) if embeds is None else embeds
        states, mask = states.to(self._execution_device), mask.to(self._execution_device)
        if not self.do_classifier_free_guidance:
            return Text(states, mask)
        if negative_prompts is None:
            null = self.transformer.y_embedder.y_embedding.to(states.device)
            return Text(torch.cat([states, null.expand(len(states), 1, -1, -1)]), mask)
        other, other_mask = self._states(negative_prompts, clean_caption)
        return Text(torch.cat([states, other.to(states.device)]), torch.cat([mask, other_mask.to(mask.device)]))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        resolution: str = "240p",
        aspect: str = "9:16",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | str = 51,
        fps: float = 24,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        references: Sequence[Sequence[Tensor]] = (),
        mask_strategy: str | Sequence[str] = "",
        aesthetic_score: float | None = 6.5,
        motion_score: float | None = None,
        camera_motion: str | None = None,
        clean_caption: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> OpenSoraPipelineOutput | tuple[Any]:
        """Makes one video for each of n prompts.

        prompt                  a text or several
        negative_prompt         texts to guide away from; None: the null caption
        resolution, aspect      names of a size in pixels, such as "240p" and "9:16" (height:width)
        height, width           pixels; given together, they replace resolution and aspect
        num_frames              a number, or a name such as "2s"
        fps                     frames per second
        num_inference_steps     number of denoising steps
        guidance_scale          1 or less: no guidance
        generator               draws the starting noise
        latents                 the starting noise (n, channels, frames, height, width); None: it is drawn
        prompt_embeds           caption states (n, 1, tokens, channels), in place of prompt
        prompt_attention_mask   (n, tokens), 0 for padding; needed with prompt_embeds
        references              for each prompt a list of latents, whose frames are copied into the video
        mask_strategy           which frames go where, "loop,reference,reference_start,target_start,length,edit_ratio"
        aesthetic_score, motion_score, camera_motion   written into the prompts unless None
        clean_caption           whether the prompts are cleaned as in training
        output_type             "latent", or with a VAE "pil", "np" or "pt"
        return_dict             False: returns the frames in a tuple

        callback_on_step_end(pipe, step, timestep, {"latents": latents}) is called after each step, and may return a
        dict with other latents. callback_on_step_end_tensor_inputs may name only "latents".
        """
        check_form(output_type, self.vae)
        if set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise UsageError("callback_on_step_end_tensor_inputs: only 'latents' is allowed. Leave out the rest.")
        self._guidance_scale, self._interrupt = guidance_scale, False
        embeds = given_embeds(prompt, prompt_embeds, prompt_attention_mask)
        prompts = [with_scores(text, aesthetic_score, motion_score, camera_motion) for text in listed(prompt)]
        rows = len(prompts) if embeds is None else len(embeds[0])
        pixels = checked_pixels(resolution, aspect, height, width)
        frames = checked_frames(num_frames, self.scheduler.config["use_timestep_transform"])
        channels = self.transformer.config["in_channels"]
        shape = (rows, channels, *latent_size(*pixels, frames, self.vae_scale_factor))
        device, dtype = self._execution_device, self.transformer.dtype
        negatives = matched("negative_prompt", negative_prompt, rows)
        strategies = matched("mask_strategy", mask_strategy, rows) or []

        text = self.encode_prompt(prompts, negatives, clean_caption=clean_caption, embeds=embeds)
        latents = starting_noise(latents, shape, generator, device, dtype)
        latents, frame_mask = place_references(latents, references, strategies)
        sizes = size_arguments(pixels, frames, fps, rows, dtype, device)
        self.scheduler.set_timesteps(
            num_inference_steps, device, shape=VideoShape(sizes["height"], sizes["width"], sizes["num_frames"])
        )
        scale = guidance_scale if self.do_classifier_free_guidance else None
        conditions = Conditions({"y": text.states, "mask": text.mask, **sizes}, scale, frame_mask)
        latents = self._denoise(latents, conditions, generator, callback_on_step_end)
        video = latents if output_type == "latent" else decode(latents, self.vae, self.video_processor, output_type)
        self.maybe_free_model_hooks()
        return OpenSoraPipelineOutput(frames=video) if return_dict else (video,)

    def _states(self, prompts: Sequence[str], clean_caption: bool) -> tuple[Tensor, Tensor]:
        if self.text_encoder is None or self.tokenizer is None:
            raise UsageError(
                "prompt: the pipeline has no text encoder. Load it with text_encoder=, or pass prompt_embeds and "
                "prompt_attention_mask.",
            )
        texts = [cleaned(text) if clean_caption else text.lower().strip() for text in prompts]
        return encode(texts, self.tokenizer, self.text_encoder, self.transformer.config["model_max_length"])

    def _denoise(
        self, latents: Tensor, conditions: Conditions, generator: Generators, callback: StepCallback | None
    ) -> Tensor:
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=self._num_timesteps) as bar:
            for index, times in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = times[0]
                latents = denoise_step(self.transformer, self.scheduler, latents, index, conditions, generator)
                if callback is not None:
                    changed = callback(self, index, times[0], {"latents": latents})
                    latents = (changed or {}).get("latents", latents)
                bar.update()
        self._current_timestep = None
        return latents
