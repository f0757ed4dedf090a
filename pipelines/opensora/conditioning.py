"""Conditioning frames: where reference latents go in a video, and how much of them may change."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.capture.errors import UsageError

from .defaults import ALIGN

_DEFAULTS = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # the values of a span whose text stops early


class ReferenceSpan(NamedTuple):
    """A span of `length` latent frames of reference `reference`, from `reference_start`, to put at `target_start` of
    clip `loop`.

    Negative starts count from the end. edit_ratio 0 keeps the frames; between 0 and 1 the frames are redrawn from that
    share of the time on.
    """

    loop: int
    reference: int
    reference_start: int
    target_start: int
    length: int
    edit_ratio: float


def parse_mask_strategy(text: str) -> list[ReferenceSpan]:
    """Reads "loop,reference,reference_start,target_start,length,edit_ratio", groups split by ";".

    A group may stop early; the rest is then 0,0,0,0,1,0. Empty text is no span.
    """
    spans = []
    for group in filter(None, (part.strip() for part in text.split(";"))):
        try:
            values = [float(value) for value in group.split(",")]
        except ValueError:
            values = []
        if not 1 <= len(values) <= 6:
            raise UsageError(f"mask_strategy: {group!r} is not one to six numbers. Separate them by commas.")
        *places, ratio = (*values, *_DEFAULTS[len(values) :])
        loop, reference, reference_start, target_start, length = (int(place) for place in places)
        spans.append(ReferenceSpan(loop, reference, reference_start, target_start, length, ratio))
    return spans


def place_references(
    latents: Tensor, references: Sequence[Sequence[Tensor]], strategies: Sequence[str], loop: int = 0
) -> tuple[Tensor, Tensor]:
    """Places reference frames; returns the latents (n, C, T, H, W) and the sampler's frame mask (n, T).

    references: for each sample its latents (C, T', H, W); strategies: for each sample its spans. The mask is 1 where
    no frame was placed.
    """
    latents = latents.clone()
    mask = torch.ones(latents.shape[0], latents.shape[2], device=latents.device)
    for row, strategy in enumerate(strategies):
        for span in parse_mask_strategy(strategy):
            if span.loop == loop:
                _place(latents[row], mask[row], references[row] if row < len(references) else (), span)
    return latents, mask


def _place(target: Tensor, mask: Tensor, references: Sequence[Tensor], span: ReferenceSpan) -> None:
    if not 0 <= span.reference < len(references):
        raise UsageError(
            f"mask_strategy: reference {span.reference} of {len(references)} is named. Pass its latents in references.",
        )
    source = references[span.reference]
    if source.shape[0] != target.shape[0] or source.shape[2:] != target.shape[2:]:
        raise UsageError(
            f"references: latents of shape {tuple(source.shape)} do not fit a video of {tuple(target.shape)}. "
            "Encode them at the size of the video.",
        )
    begin = _snap(span.reference_start, source.shape[1])
    start = _snap(span.target_start, target.shape[1])
    length = max(0, min(span.length, source.shape[1] - begin, target.shape[1] - start))
    target[:, start : start + length] = source[:, begin : begin + length].to(target)
    mask[start : start + length] = span.edit_ratio


def _snap(place: int, frames: int) -> int:
    """The multiple of ALIGN inside the clip nearest to a frame; negative frames count from the clip's end."""
    place = max(0, place + frames if place < 0 else place)
    clip, rest = divmod(place, ALIGN)
    if rest > ALIGN / 2 and clip < frames // ALIGN - 1:
        clip += 1
    return min(clip, max(0, frames - 1) // ALIGN) * ALIGN
