"""Finds the files that hold the weights of a component. The files may have a variant in their names, such as fp16, and
the weights may be in one file or in several shards."""

import re
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from octavo.capture.errors import FileError, UsageError

from .files import count_tensors, read_json

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Weights(NamedTuple):
    """The weights that are loaded from a folder.

    `variant` is the variant in the file names, such as fp16, or None; `files` are sorted by name. Other files of the
    folder are not read.
    """

    variant: str | None = None
    files: tuple[Path, ...] = ()


def weights_of(folder: Path) -> Weights:
    """Returns the weights to load from `folder`: those without a variant (such as fp16) in their names, or else
    those of the only variant.

    The result is empty for a folder without safetensors weights, such as a tokenizer's. Raises UsageError for a folder
    with several variants and no weights without one, FileError for an index that names missing files.
    """
    config = folder / "config.json"
    of_diffusers = config.is_file() and "_class_name" in read_json(config)
    stem = "diffusion_pytorch_model" if of_diffusers else "model"
    single, index = _by_variant(folder, stem, r"(?:\.([^.]+))?\.safetensors"), _indices(folder, stem)
    variants = [*single, *(variant for variant in index if variant not in single)]
    if not variants:
        return Weights()
    variant = None if None in variants else variants[0]
    if variant is not None and len(variants) > 1:
        names = sorted(map(str, variants))
        fact = f"holds the variants {', '.join(names)} of the weights, and no weights without a variant"
        make = f"from_pretrained(..., variant='{names[0]}') and save_pretrained of diffusers"
        remedy = f"Make a directory with one variant by {make}"
        raise UsageError(f"{folder}: {fact}. {remedy}.")
    # where a folder has both an index and a single file, diffusers loads the index, transformers the file
    if variant in index and (of_diffusers or variant not in single):
        return Weights(variant, _shards(folder, index[variant]))
    return Weights(variant, (single[variant],))


def _by_variant(folder: Path, stem: str, rest: str) -> dict[str | None, Path]:
    """Returns a dict from variant to file for the files in `folder` whose whole name matches the regex `stem` + `rest`.

    The variant is the first group of the match, None for a name without a variant.
    """
    matches = ((re.fullmatch(stem + rest, file.name), file) for file in sorted(folder.iterdir()))
    return {match[1]: file for match, file in matches if match and not _SHARD.search(match[1] or "")}


def _indices(folder: Path, stem: str) -> dict[str | None, Path]:
    older = _by_variant(
        folder, stem, r"\.safetensors\.([^.]+)\.index\.json"
    )  # the name that diffusers before 0.32 wrote
    return older | _by_variant(folder, stem, r"\.safetensors\.index(?:\.([^.]+))?\.json")


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries.values()):
        raise FileError(f"{index}: lists no weights. Download it again.")
    names = sorted(set(entries.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise FileError(f"{folder}: no file {name}, which {index.name} names. Download the folder again.")
    return tuple(folder / name for name in names)


def check_weights(folder: Path) -> None:
    """Checks the weight files of a component's folder without loading them.

    Raises FileError for a damaged or missing file and for a folder with only pickle weights, UsageError for a folder
    with several variants and no weights without one.
    """
    files = weights_of(folder).files
    if not files and not any(folder.glob("*.safetensors")) and any(f.suffix in _PICKLES for f in folder.iterdir()):
        raise FileError(f"{folder}: no safetensors weights, and pickle is not loaded. Convert the weights first.")
    count_tensors(files)


def stored_dtype(folder: Path) -> str | None:
    """Returns the dtype of a component's first stored floating-point weight, such as "float16", or None if no weight of
    the component is stored in float16, bfloat16 or float32."""
    for file in weights_of(folder).files if folder.is_dir() else ():
        with safe_open(file, "pt", backend="pread") as weights:
            kinds = (weights.get_slice(key).get_dtype() for key in weights.keys())  # noqa: SIM118
            if (dtype := next((_DTYPES[kind] for kind in kinds if kind in _DTYPES), None)) is not None:
                return dtype
    return None
