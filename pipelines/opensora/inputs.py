"""Checks the arguments of a pipeline's call, and converts them: texts to lists, names of sizes and durations to
numbers."""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from octavo.capture.errors import UsageError

from .defaults import IMAGE_FPS
from .sampling import Generators
from .sizes import frame_count, video_size


def listed(text: str | Sequence[str] | None) -> list[str]:
    """Returns a list: [text] for a single text, the texts for a sequence, [] for None."""
    return [] if text is None else [text] if isinstance(text, str) else list(text)


def matched(name: str, text: str | Sequence[str] | None, count: int) -> list[str] | None:
    """Returns one text for each of `count` prompts: a single text is repeated, None stays None.

    Raises UsageError, with the argument's `name`, for another number of texts.
    """
    if text is None:
        return None
    texts = listed(text)
    if len(texts) == 1:
        texts *= count
    if len(texts) != count:
        raise UsageError(
            f"{name}: has {len(texts)} values for {count} prompts. Give one value, or one for each prompt."
        )
    return texts


def given_embeds(
    prompt: str | Sequence[str] | None, embeds: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Returns the caption states `embeds` and their `mask` if the caller passed them instead of a prompt; None if a
    prompt is given.

    Raises UsageError if both or neither are given, if the list of prompts is empty, and for shapes other than (prompts,
    1, tokens, channels) of the states and (prompts, tokens) of the mask.
    """
    if (prompt is None) == (embeds is None):
        raise UsageError("prompt: exactly one of prompt and prompt_embeds is needed. Give one of them.")
    if embeds is None:
        if not listed(prompt):
            raise UsageError("prompt: the list is empty. Give at least one text.")
        return None
    if mask is None or embeds.ndim != 4 or tuple(mask.shape) != (embeds.shape[0], embeds.shape[2]):
        raise UsageError(
            f"prompt_embeds: the shape {tuple(embeds.shape)} does not fit the shape of prompt_attention_mask, "
            f"{None if mask is None else tuple(mask.shape)}. "
            "Give prompt_embeds (prompts, 1, tokens, channels) and prompt_attention_mask (prompts, tokens).",
        )
    return embeds, mask


def checked_pixels(resolution: str, aspect: str, height: int | None, width: int | None) -> tuple[int, int]:
    """Returns the size (height, width) in pixels: `height` and `width` if they are given, else the size that
    Open-Sora's table has for a `resolution` such as "240p" and an `aspect` such as "9:16".

    Raises UsageError if only one of height and width is given, and for a resolution or aspect that is not in the table.
    """
    if (height is None) != (width is None):
        raise UsageError("height, width: only one of them is given. Give both, or neither.")
    return video_size(resolution, aspect) if height is None or width is None else (height, width)


def checked_frames(num_frames: int | str, transform: bool) -> int:
    """Returns the number of frames that `num_frames` means, a number or a name such as "2s".

    `transform` says whether the scheduler uses its timestep transform. If so, raises UsageError for 2 to 16 frames, for
    which the transform divides zero by zero.
    """
    frames = frame_count(num_frames)
    if transform and 1 < frames < 17:
        raise UsageError(f"frames: the timestep transform is undefined for {frames} frames. Use 1, or at least 17.")
    return frames


def size_arguments(
    pixels: tuple[int, int], frames: int, fps: float, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Returns the transformer's arguments height, width, num_frames, ar (height / width) and fps, each (rows,), on
    `device`. They describe `rows` videos of one size; `pixels` is (height, width).

    The arguments have the model's `dtype`. For a model in float16 they are float32, because the timestep transform
    computes the product of height and width, which float16 cannot hold. If `frames` is 1, an image, the argument fps is
    IMAGE_FPS (120).
    """
    values = {
        "height": pixels[0],
        "width": pixels[1],
        "num_frames": frames,
        "ar": pixels[0] / pixels[1],
        "fps": fps if frames > 1 else IMAGE_FPS,
    }
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return {name: torch.full((rows,), value, dtype=dtype, device=device) for name, value in values.items()}


def starting_noise(
    latents: Tensor | None, shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Draws standard normal latents of `shape` and `dtype` with `generator`; if `latents` are given, returns them on
    the device instead.

    Raises UsageError if the given latents have another shape.
    """
    if latents is None:
        return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
    if tuple(latents.shape) != tuple(shape):
        raise UsageError(
            f"latents: have shape {tuple(latents.shape)}, expected {tuple(shape)}. Give latents of the expected shape."
        )
    return latents.to(device=device)
