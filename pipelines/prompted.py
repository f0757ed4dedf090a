"""The meaning of a prompt to a pipeline: a text, a class label, a row of embeddings, or nothing but a seed."""

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from octavo.capture.errors import UsageError

from .files import read_json

_EMBEDDINGS = re.compile(r"(pooled_)?prompt_embeds")  # the beginning of the names of arguments instead of a prompt
_ROWS = re.compile(r"prompt|embeds")  # arguments whose rows may belong to prompts
_IMAGENET = Path(__file__).with_name("imagenet.txt")  # the 1000 classes of ILSVRC 2012 in order, with WordNet's names


class Rows(NamedTuple):
    """An argument of the call that is another tensor for each prompt: (1, ...)."""

    by_prompt: Mapping[str, Tensor]


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call."""
    return inspect.signature(type(pipe).__call__).parameters


def embedded(arguments: Mapping[str, Any]) -> bool:
    """Whether the arguments of a call hold embeddings, which stand for the prompt."""
    return any(_EMBEDDINGS.match(name) for name in arguments)


def labelled(pipe: Any) -> bool:
    """Whether a pipeline draws classes: its call takes class labels and no prompt."""
    parameters = parameters_of(pipe)
    if "class_labels" not in parameters or "prompt" in parameters:
        return False
    return parameters["class_labels"].default is inspect.Parameter.empty or _classes(pipe) is not None


def prompt_arguments(pipe: Any, prompt: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the call for one prompt. Raises UsageError as `class_label` does."""
    made = {name: value.by_prompt[prompt] if isinstance(value, Rows) else value for name, value in arguments.items()}
    if labelled(pipe):
        made["class_labels"] = [class_label(pipe, prompt)]
    elif "prompt" in parameters_of(pipe):
        made["prompt"] = None if embedded(arguments) else prompt
    return made


def rows_of(arguments: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Any]:
    """The arguments with embeddings of as many rows as there are prompts split into `Rows`.

    Raises UsageError for embeddings of several rows, but another number. One prompt takes all rows, as a batch.
    """
    made = dict(arguments)
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or not _ROWS.search(name) or value.ndim < 2 or len(prompts) < 2:
            continue
        if len(value) == len(prompts):
            made[name] = Rows({prompt: value[at : at + 1] for at, prompt in enumerate(prompts)})
        elif len(value) != 1:
            fact = f"has {len(value)} rows for {len(prompts)} prompts"
            raise UsageError(f"--arg {name}: {fact}. Give one row, or one for each prompt.")
    return made


def note_on_prompts(pipe: Any, arguments: Mapping[str, Any]) -> str | None:
    """A sentence for the user where a prompt is no text to the pipeline, nor a class or a row of embeddings."""
    kind = type(pipe).__name__
    if labelled(pipe):
        nameless = not _own_names(pipe) and bool(_names(pipe))
        return f"{kind} has no names for its 1000 classes: names are read as those of ImageNet." if nameless else None
    if any(isinstance(value, Rows) for value in arguments.values()):
        return None
    if "prompt" not in parameters_of(pipe):
        return f"{kind} takes no prompt: a prompt here gives only the seed of the noise."
    if embedded(arguments):
        return f"{kind} is given embeddings of one text: a prompt here gives only the seed of the noise."
    return None


def class_label(pipe: Any, text: str) -> int:
    """The class that a prompt says, by its number or by a name of the pipeline's id2label, in small or large letters.

    Raises UsageError for an unknown number or name, and for a name of several classes.
    """
    kind, word = type(pipe).__name__, text.strip()
    names = _names(pipe)
    count = _classes(pipe)
    if word.isdecimal():
        if count is not None and int(word) >= count:
            raise UsageError(f"{kind}: there is no class {word}. Choose one of 0 to {count - 1}.")
        return int(word)
    found = names.get(word.casefold())
    if found is None:
        parts = [names.get(part.strip().casefold(), set()) for part in word.split(",")]
        found = set.intersection(*parts)
    if len(found) == 1:
        return next(iter(found))
    if found:
        numbers = " and ".join(map(str, sorted(found)))
        raise UsageError(f"{kind}: {word!r} is the name of the classes {numbers}. Write the number.")
    near = difflib.get_close_matches(word.casefold(), names, 1)
    remedy = (
        f"Did you mean {near[0]!r}?" if near else "Give a number" + (" or a name" if names else "") + " in each line."
    )
    raise UsageError(f"{kind}: draws classes, and {word[:60]!r} is none. {remedy}")


def _classes(pipe: Any) -> int | None:
    """The number of classes that the denoiser knows; None where it does not say."""
    for part, name in (("transformer", "num_embeds_ada_norm"), ("unet", "num_class_embeds")):
        count = getattr(getattr(getattr(pipe, part, None), "config", None), name, None)
        if isinstance(count, int):
            return count
    return None


def _names(pipe: Any) -> dict[str, set[int]]:
    """The numbers of the classes by name in small letters. Each of several names of a class counts.

    A model of 1000 classes without names, as `save_pretrained` leaves a DiT, has those of ImageNet.
    """
    pairs = _own_names(pipe)
    if not pairs and _classes(pipe) == 1000:
        pairs = _split(enumerate(_IMAGENET.read_text(encoding="ascii").splitlines()))
    names: dict[str, set[int]] = {}
    for name, number in pairs:
        names.setdefault(name.strip().casefold(), set()).add(int(number))
    return names


def _own_names(pipe: Any) -> list[tuple[str, int]]:
    """The names of the classes in the pipeline's model_index.json, with the number of each.

    The pipeline itself keeps only the last of several classes with one name.
    """
    file = Path(str(getattr(pipe, "config", {}).get("_name_or_path") or "")) / "model_index.json"
    labels = read_json(file).get("id2label") if file.is_file() else None
    pairs = _split(labels.items()) if isinstance(labels, Mapping) else []
    return pairs or list((getattr(pipe, "labels", None) or {}).items())


def _split(labels: Iterable[tuple[Any, Any]]) -> list[tuple[str, int]]:
    """Each label whole, and each of its names between commas, with the number of the class."""
    return [(name, int(number)) for number, label in labels for name in {str(label), *str(label).split(",")}]
