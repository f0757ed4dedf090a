"""Fuses LoRA files into the float weights of a pipeline, before it is captured or drawn with.

A LoRA (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, 2021) adds scale * B A to a
weight, where A (rank, in) and B (out, rank) are small. The integer codes of a weight are too coarse for such a small
change, so the sum is computed in float and then quantized. diffusers and peft read the files and compute the sums.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from octavo.capture.errors import MisfitError, UsageError, first_sentence


class Lora(NamedTuple):
    """A LoRA file and the factor `scale` that its weights are multiplied by."""

    file: Path
    scale: float = 1.0

    def __str__(self) -> str:
        return str(self.file) if self.scale == 1 else f"{self.file}:{self.scale:g}"


def parse_loras(texts: Sequence[str]) -> list[Lora]:
    """Reads LoRAs from texts FILE or FILE:SCALE, and makes the paths absolute.

    Raises UsageError for a file that does not exist or is not a .safetensors file, for a scale that is no finite
    number, and if peft is not installed.
    """
    loras = [_parse(text) for text in texts]
    if loras and find_spec("peft") is None:
        raise UsageError('LoRA: needs the package peft. Run pip install "octavo[lora]".')
    return loras


def _parse(text: str) -> Lora:
    name, colon, factor = text.rpartition(":")
    if not colon or Path(text).is_file():
        name, factor = text, "1"
    try:
        scale = float(factor)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise UsageError(f"LoRA {text}: '{factor}' is not a finite number. Give FILE or FILE:SCALE.")
    if not Path(name).is_file():
        raise UsageError(f"LoRA {text}: there is no file {name}. Give a .safetensors file.")
    if Path(name).suffix != ".safetensors":
        raise UsageError(f"LoRA {text}: is not a .safetensors file. Octavo opens no pickle files.")
    return Lora(Path(name).resolve(), scale)


def fuse_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Adds each of `loras` to the weights of the denoiser and the text encoders of `pipe`, one after the other.

    Raises UsageError for a pipeline that takes no LoRA, and MisfitError for a file that does not fit the pipeline: if
    it changes no layer, or has tensors for layers that the pipeline does not have.
    """
    for lora in loras:
        if not hasattr(pipe, "load_lora_weights"):
            raise UsageError(f"LoRA {lora}: {type(pipe).__name__} takes no LoRA. Remove --lora.")
        with _ignored_tensors() as ignored:
            try:
                pipe.load_lora_weights(str(lora.file.parent), weight_name=lora.file.name, adapter_name="octavo")
                fact = ignored[0] if ignored else "" if pipe.get_list_adapters() else "it changes no layer"
            except Exception as error:  # diffusers and peft raise errors of many types for files that do not fit
                fact = first_sentence(error)[:300] or type(error).__name__
            if fact:
                refusal = f"does not fit {type(pipe).__name__} ({fact})"
                raise MisfitError(f"{lora.file}: {refusal}. Give a LoRA of this model.")
            pipe.fuse_lora(lora_scale=lora.scale, safe_fusing=True, adapter_names=["octavo"])
            pipe.unload_lora_weights()


@contextmanager
def _ignored_tensors() -> Iterator[list[str]]:
    """Inside the `with` block, hides the log of diffusers and peft. Yields a list that collects the logged messages
    about ignored tensors of a LoRA file, which are for layers that the model does not have."""
    facts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "unexpected keys" in record.getMessage():
                facts.append(" ".join(record.getMessage().split())[:300].rstrip(". "))

    root = logging.getLogger("diffusers")
    level, handlers, propagate = root.level, root.handlers, root.propagate
    root.handlers, root.propagate = [Collector()], False
    root.setLevel(logging.WARNING)
    try:
        yield facts
    finally:
        root.handlers, root.propagate = handlers, propagate
        root.setLevel(level)
