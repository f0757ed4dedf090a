"""Finds the files of a folder that hold the weights of a component: which variant, one file or several shards."""

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
    """The weights that are loaded from a folder: `variant`, the part of their names such as fp16 (None: without one),
    and `files` in the order of their names. Other files of the folder are not read."""

    variant: str | None = None
    files: tuple[Path, ...] = ()


def weights_of(folder: Path) -> Weights:
    """The weights that diffusers or transformers loads from `folder`: those without a variant, or the only variant.

    Both are empty for a folder without safetensors weights, such as that of a tokenizer. Raises UsageError for several
    variants of which none is the default, FileError for an index that names files that are not there.
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
        fact = f"holds weights in the variants {', '.join(names)} and none without a variant"
        remedy = f"from_pretrained(..., variant='{names[0]}') and save_pretrained of diffusers make a directory of one"
        raise UsageError(f"{folder}: {fact}. {remedy}.")
    # of an index and a single file diffusers takes the index, transformers the file
    if variant in index and (of_diffusers or variant not in single):
        return Weights(variant, _shards(folder, index[variant]))
    return Weights(variant, (single[variant],))


def _by_variant(folder: Path, stem: str, rest: str) -> dict[str | None, Path]:
    """The files of a folder whose name is `stem` and `rest`, by the variant that is the first group of `rest`."""
    matches = ((re.fullmatch(stem + rest, file.name), file) for file in sorted(folder.iterdir()))
    return {match[1]: file for match, file in matches if match and not _SHARD.search(match[1] or "")}


def _indices(folder: Path, stem: str) -> dict[str | None, Path]:
    older = _by_variant(folder, stem, r"\.safetensors\.([^.]+)\.index\.json")  # as diffusers wrote it before 0.32
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
    """Raises FileError for a folder with pickle weights alone, and for a damaged file of its weights; and what
    `weights_of` raises."""
    files = weights_of(folder).files
    if not files and not any(folder.glob("*.safetensors")) and any(f.suffix in _PICKLES for f in folder.iterdir()):
        raise FileError(f"{folder}: no safetensors weights; pickle weights are not loaded. Convert them first.")
    count_tensors(files)


def stored_dtype(folder: Path) -> str | None:
    """The floating dtype of a component's first stored weight ("float16", ...); None without one."""
    for file in weights_of(folder).files if folder.is_dir() else ():
        with safe_open(file, "pt", backend="pread") as weights:
            kinds = (weights.get_slice(key).get_dtype() for key in weights.keys())  # noqa: SIM118
            if (found := next((_DTYPES[kind] for kind in kinds if kind in _DTYPES), None)) is not None:
                return found
    return None
