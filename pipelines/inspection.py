"""Checks a model directory before anything in it is loaded or run."""

from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from octavo.capture.errors import FileError, UsageError

from . import FAMILIES, family_of
from .family import Family
from .files import read_json
from .weights import check_weights

_ONE_FILE = (
    ".safetensors",
    ".ckpt",
    ".gguf",
    ".bin",
    ".pt",
    ".pth",
)  # endings of models that are published as one file


class Component(NamedTuple):
    """Describes a component that model_index.json lists: its library, its class `kind`, its folders.

    Library and class are None for an absent component. A class that holds several nets, such as MultiControlNetModel,
    has several folders.
    """

    library: str | None
    kind: str | None
    folders: tuple[Path, ...]


def components_in(directory: Path, index: dict[str, Any]) -> dict[str, Component]:
    """Returns a dict from name to description of the components in `index`, the content of the model_index.json in
    `directory`."""
    components = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2:
            continue
        if all(isinstance(word, str) for word in entry) or entry == [None, None]:
            components[name] = Component(entry[0], entry[1], tuple(_folders(directory / name, entry[1])))
    return components


def _folders(first: Path, kind: str | None) -> Iterator[Path]:
    """Yields the folders of a component: `first`, and for a class of several nets also `first` with the endings _1, _2
    and so on, as many as exist. Yields none for an absent component, whose class `kind` is None."""
    if kind is None:
        return
    yield first
    numbered = (first.with_name(f"{first.name}_{number}") for number in count(1))
    yield from takewhile(Path.is_dir, numbered if kind.startswith("Multi") else ())


def inspect_model(directory: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Checks that a diffusers directory is safe to load, and returns the content of its model_index.json.

    Raises UsageError for a missing directory; FileError for a directory that is not a pipeline, for broken JSON, for
    custom code unless `trust_remote_code` is True, for a truncated weights file, and for a component that has only
    pickle weights.
    """
    _check_directory(directory)
    file = directory / "model_index.json"
    if not file.is_file():
        raise FileError(f"{directory}: no model_index.json. {_instead(directory)}")
    index = read_json(file)
    _refuse_code(directory, index, trust_remote_code)
    for name, component in components_in(directory, index).items():
        for folder in component.folders:
            if not folder.is_dir():
                raise FileError(f"{directory}: no folder {name}, which model_index.json names. Download it again.")
            check_weights(folder)
    return index


def _check_directory(directory: Path) -> None:
    if directory.is_file() and directory.suffix in _ONE_FILE:
        raise UsageError(f"{directory}: is a single file, not a directory. {_from_one_file(directory)}")
    if directory.is_file():
        raise UsageError(f"{directory}: is a file. Give the directory of a whole diffusers pipeline.")
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such model directory. Give a diffusers directory, or demo.")


def _instead(directory: Path) -> str:
    """Returns advice for a `directory` that is not a pipeline: which directory to give instead, such as the parent of a
    component's folder, or how to make a pipeline of a model in a single file."""
    inside = [*directory.glob("*/model_index.json"), *directory.glob("snapshots/*/model_index.json")]
    if (directory.parent / "model_index.json").is_file():
        return f"It holds one component of a pipeline. Give {directory.parent}."
    if inside:
        return f"Give {sorted(inside)[0].parent}."
    files = [file for file in sorted(directory.iterdir()) if file.suffix in _ONE_FILE]
    if (directory / "config.json").is_file() or not files:
        one = " It holds one component." if (directory / "config.json").is_file() else ""
        return f"{one.strip()} Give the directory of a whole diffusers pipeline.".strip()
    return f"{files[0].name} is a single file. {_from_one_file(files[0])}"


def _from_one_file(file: Path) -> str:
    """Returns advice for `file`, a model in a single file, which therefore has no configuration: how to make a pipeline
    directory from it. A .gguf file is already quantized, so the advice for it is to give the float pipeline instead."""
    if file.suffix == ".gguf":
        return "GGUF holds a denoiser that is already quantized. Give the diffusers directory of the float pipeline."
    code = f"StableDiffusionXLPipeline.from_single_file('{file.name}').save_pretrained('DIR')"
    return f"Make a directory with the pipeline's class in diffusers, as in {code}, and give that directory."


def family_at(directory: Path, name: str | None = None) -> Family:
    """Returns the family (defaults for one kind of pipeline) called `name`, a key of FAMILIES. If `name` is None,
    returns the family of the model in `directory`, known by the class that its model_index.json or config.json names;
    GENERIC if no family fits.

    Raises UsageError for a missing directory, FileError for a directory without a pipeline and for damaged files.
    """
    _check_directory(directory)
    if name is not None:
        return FAMILIES[name]
    config = directory / "config.json"
    if not (directory / "model_index.json").is_file() and config.is_file():
        words = read_json(config)
        architectures = words.get("architectures")
        kinds = [words.get("model_type"), words.get("_class_name")]
        kinds += architectures if isinstance(architectures, list) else []
        for family in FAMILIES.values():
            if any(kind in family.models for kind in kinds):
                return family
    return family_of(str(inspect_model(directory, trust_remote_code=True).get("_class_name")))


def _refuse_code(directory: Path, index: dict[str, Any], trusted: bool) -> None:
    kinds = index.get("_class_name")
    names = [*(kinds if isinstance(kinds, list) else [kinds]), "pipeline"]
    own = [directory / f"{name}.py" for name in names if isinstance(name, str)]
    code = [f for f in own if f.is_file()] + [
        f for n in index if (directory / n).is_dir() for f in (directory / n).glob("*.py")
    ]
    if code and not trusted:
        raise FileError(
            f"{directory}: needs custom code ({code[0].relative_to(directory)}), which is not run. "
            "Pass --trust-remote-code after reading it."
        )  # fmt: skip
