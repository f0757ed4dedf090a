"""Defines the `Format` object of the format `modelopt`. Importing this module needs no torch."""

from functools import partial
from pathlib import Path

from ...layers.schemes import FP8_DYNAMIC, FP8_STATIC
from ..diffusers.directory import MODEL_FILES, find_intact
from ..record import Description, Format, model_writer
from .check import check
from .files import LAYOUT, SGLANG_NAME, VLLM_NAME, Files
from .rules import METHOD, ROWS_WORD, STATIC_WORD, joined, kept_float, refusal

_SCHEMES = {STATIC_WORD: FP8_STATIC, ROWS_WORD: FP8_DYNAMIC}


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
        writer=model_writer("octavo.calibrate.formats.modelopt.write:write_modelopt"),
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
