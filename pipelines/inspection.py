"""Inspects a model directory before anything in it is loaded or run."""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from octavo.capture.errors import FileError, UsageError

from . import FAMILIES, family_of
from .family import Family
from .files import count_tensors, read_json

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def inspect_model(directory: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """The content of `model_index.json` of a diffusers directory whose files are safe to load.

    Raises UsageError where there is no such directory; FileError for a directory that is no pipeline, broken JSON,
    custom code, pickle weights only, or a truncated weights file.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such model directory. Give a diffusers directory, or demo.")
    file = directory / "model_index.json"
    if not file.is_file():
        raise FileError(f"{directory}: no model_index.json. Give the directory of a whole diffusers pipeline.")
    index = read_json(file)
    _refuse_code(directory, index, trust_remote_code)
    for name, kind in index.items():
        if not name.startswith("_") and isinstance(kind, list) and kind[-1] is not None:
            if not (directory / name).is_dir():
                raise FileError(f"{directory}: no folder {name}, which model_index.json names. Download it again.")
            check_weights(directory / name)
    return index


def family_at(directory: Path, name: str | None = None) -> Family:
    """The family of the model in `directory`: the one called `name`, or the one that the files name.

    Raises UsageError when there is no such directory, FileError as `inspect_model` does.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such model directory. Give a diffusers directory, or demo.")
    if name is not None:
        return FAMILIES[name]
    config = directory / "config.json"
    if not (directory / "model_index.json").is_file() and config.is_file():
        words = read_json(config)
        more = words.get("architectures")
        kinds = [words.get("model_type"), words.get("_class_name"), *(more if isinstance(more, list) else [])]
        for family in FAMILIES.values():
            if any(kind in family.models for kind in kinds):
                return family
    return family_of(str(inspect_model(directory, trust_remote_code=True).get("_class_name")))


def _refuse_code(directory: Path, index: dict[str, Any], trusted: bool) -> None:
    own = [directory / f"{name}.py" for name in ("pipeline", index.get("_class_name")) if isinstance(name, str)]
    if isinstance(index.get("_class_name"), list):
        own.insert(0, directory / f"{index['_class_name'][0]}.py")
    code = [f for f in own if f.is_file()] + [
        f for n in index if (directory / n).is_dir() for f in (directory / n).glob("*.py")
    ]
    if code and not trusted:
        raise FileError(
            f"{directory}: needs custom code ({code[0].relative_to(directory)}), which is not run. "
            "Pass --trust-remote-code after reading it."
        )  # fmt: skip


def check_weights(folder: Path) -> None:
    """Raises FileError for a folder with pickle weights alone, and for a damaged safetensors file."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and any(f.suffix in _PICKLES for f in folder.iterdir()):
        raise FileError(f"{folder}: no safetensors weights; pickle weights are not loaded. Convert them first.")
    count_tensors(weights)


def stored_dtype(folder: Path) -> str | None:
    """The floating dtype of a component's first stored weight ("float16", ...); None without one."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt", backend="pread") as weights:
            kinds = (weights.get_slice(key).get_dtype() for key in weights.keys())  # noqa: SIM118
            return next((names[kind] for kind in kinds if kind in names), None)
    return None
