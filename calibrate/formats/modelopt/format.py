"""Defines the `Format` object of the format `modelopt`. Importing this module needs no torch."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...layers.schemes import FP8_DYNAMIC, FP8_STATIC
from ..diffusers.directory import MODEL_FILES, find_intact
from ..record import Deployment, Description, Format
from .check import check
from .files import LAYOUT, SGLANG_NAME, VLLM_NAME, Files
from .rules import METHOD, ROWS_WORD, STATIC_WORD, joined, kept_float, refusal

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer

_SCHEMES = {STATIC_WORD: FP8_STATIC, ROWS_WORD: FP8_DYNAMIC}


def write(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes config.json and the weights of `model`, with the FP8 `layers` in place of its float layers, into
    `directory`, in format `modelopt`. `modes` has the permissions of new files. Takes from `deployment` the float
    parameters that smoothing factors were folded into, and the largest size of a weight file."""
    from .write import write_modelopt

    write_modelopt(layers, model, directory, modes, parameters=deployment.parameters, shard=deployment.shard)


def describe(path: Path) -> Description:
    """Describes the model in format `modelopt` at `path`: its class, and the number of its FP8 layers.

    Raises FileError for files that are missing or damaged.
    """
    files = Files.open(path)
    scheme, count = _SCHEMES.get(files.algo, files.algo), len(files.codes)
    title = f"a {files.kind} in the layout of ModelOpt, for vLLM-Omni and SGLang on CUDA"
    return Description(title, (("layers", f"{count} {scheme}"),), {scheme: count})


FORMATS = (
    Format(
        name="modelopt",
        files=MODEL_FILES,
        writer=write,
        schemes=(FP8_STATIC, FP8_DYNAMIC),
        mixed=False,
        whole=(FP8_STATIC,),
        consumer=VLLM_NAME,
        also=(SGLANG_NAME,),
        find=partial(find_intact, method=METHOD, folder="modelopt"),
        check=check,
        optional=frozenset({LAYOUT}),
        describe=describe,
        folds=True,
        alone=True,
        made_biases=False,
        refusal=refusal,
        kept_float=kept_float,
        joined=joined,
    ),
)
