"""Checks the arguments of a pipeline's call and brings them into one form."""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from octavo.capture.errors import UsageError

from .defaults import IMAGE_FPS
from .sampling import Generators
from .sizes import frame_count, video_size


def listed(text: str | Sequence[str] | None) -> list[str]:
    """Makes a list of one text or several; [] for None."""
    return [] if text is None else [text] if isinstance(text, str) else list(text)


def matched(name: str, text: str | Sequence[str] | None, count: int) -> list[str] | None:
    """Matches texts to `count` prompts: repeats a single text, refuses another number; None stays None."""
    if text is None:
        return None
    texts = listed(text)
    if len(texts) == 1:
        texts *= count
    if len(texts) != count:
        raise UsageError(f"{name}: {len(texts)} are given for {count} prompts. Give one, or one a prompt.")
    return texts


def given_embeds(
    prompt: str | Sequence[str] | None, embeds: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The caption states and mask that replace a prompt, or None with a prompt; exactly one of both must be given."""
    if (prompt is None) == (embeds is None):
        raise UsageError("prompt: exactly one of prompt and prompt_embeds is needed. Give one of them.")
    if embeds is None:
        if not listed(prompt):
            raise UsageError("prompt: the list is empty. Give at least one text.")
        return None
    if mask is None or embeds.ndim != 4 or tuple(mask.shape) != (embeds.shape[0], embeds.shape[2]):
        raise UsageError(
            f"prompt_embeds: {tuple(embeds.shape)} with a mask of {None if mask is None else tuple(mask.shape)}. "
            "Give states (n, 1, L, E) and prompt_attention_mask (n, L).",
        )
    return embeds, mask


def checked_pixels(resolution: str, aspect: str, height: int | None, width: int | None) -> tuple[int, int]:
    """Returns the size (height, width) in pixels: as given, or of the table of resolutions and aspects."""
    if (height is None) != (width is None):
        raise UsageError("height, width: only one of them is given. Give both, or neither.")
    return video_size(resolution, aspect) if height is None or width is None else (height, width)


def checked_frames(num_frames: int | str, transform: bool) -> int:
    """The number of frames. With `transform` refuses 2 to 16, where the timestep transform divides zero by zero."""
    frames = frame_count(num_frames)
    if transform and 1 < frames < 17:
        raise UsageError(f"frames: the timestep transform is undefined for {frames} frames. Use 1, or at least 17.")
    return frames


def size_arguments(
    pixels: tuple[int, int], frames: int, fps: float, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The arguments height, width, num_frames, ar and fps, each (rows,), in the dtype of the model; a single frame has
    its own fps.

    float16 cannot hold height * width, which the timestep transform needs: the arguments are then fp32.
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
    """Draws standard normal latents of `shape`, or returns the given latents, which must have that shape."""
    if latents is None:
        return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
    if tuple(latents.shape) != tuple(shape):
        raise UsageError(f"latents: shape {tuple(latents.shape)}, expected {tuple(shape)}. Give that shape.")
    return latents.to(device=device)
