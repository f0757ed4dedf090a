"""Places conditioning frames: latents of given pictures or videos that a new video keeps, or changes a little."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.capture.errors import UsageError

from .defaults import ALIGN

_DEFAULTS = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # the values of a span whose text stops early


class ReferenceSpan(NamedTuple):
    """Says which latent frames of a reference (a given picture or video) to copy into the new video, and where.

    Open-Sora makes a long video as several clips, one after the other; `loop` is the number of the clip, from 0. Copies
    `length` frames of reference number `reference` (from 0) into this clip: the frames from `reference_start` on go to
    the places from `target_start` on. A negative start counts from the end; both starts are rounded to a multiple of 5.
    With edit_ratio 0 the frames are kept; with a ratio r up to 1 they are redrawn during the last share r of the
    denoising.
    """

    loop: int
    reference: int
    reference_start: int
    target_start: int
    length: int
    edit_ratio: float


def parse_mask_strategy(text: str) -> list[ReferenceSpan]:
    """Parses spans separated by ";", each "loop,reference,reference_start,target_start,length,edit_ratio".

    A span may leave out its last values; the defaults are 0,0,0,0,1,0. Empty text has no span. Raises UsageError for a
    span that is not one to six numbers.
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
    """Copies reference frames into `latents` (n, C, T, H, W); returns the result and the sampler's frame mask (n, T).

    For each of the n samples, `references` has a list of latents (C, T', H, W). For each sample `strategies` has a text
    that says which frames of these latents go where: spans
    "loop,reference,reference_start,target_start,length,edit_ratio", separated by ";". Only spans whose loop is the
    argument `loop` are used. The mask is the edit_ratio for a copied frame, and 1 for every other frame. Raises
    UsageError for a reference that is missing or has another size.
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
            f"mask_strategy: names reference {span.reference}, counted from 0, but there are only "
            f"{len(references)} references. Pass the latents of each in the argument references.",
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
    """Rounds the frame number `place` to a multiple of ALIGN (5), for a clip of `frames` frames; a negative place
    counts from the end.

    Rounds to the nearest multiple, but down if the nearest is above `place` and the clip has fewer than ALIGN frames
    from the nearest multiple on. The result is below `frames`.
    """
    place = max(0, place + frames if place < 0 else place)
    clip, rest = divmod(place, ALIGN)
    if rest > ALIGN / 2 and clip < frames // ALIGN - 1:
        clip += 1
    return min(clip, max(0, frames - 1) // ALIGN) * ALIGN
