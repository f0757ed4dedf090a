"""Passes a prompt to a pipeline: as a text, as a class label, as a row of embeddings, or only as the seed of noise."""

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from octavo.capture.errors import UsageError

from .files import read_json

_EMBEDDINGS = re.compile(r"(pooled_)?prompt_embeds")  # names of arguments that replace the prompt begin so
_ROWS = re.compile(r"prompt|embeds")  # names of arguments whose rows may belong to prompts contain one of these
_IMAGENET = Path(__file__).with_name("imagenet.txt")  # the 1000 classes of ILSVRC 2012 in order, with WordNet's names


class Rows(NamedTuple):
    """Holds one argument of the pipeline's call that differs between prompts: `by_prompt` maps each prompt to its
    tensor, (1, ...), one row of the embeddings of all prompts."""

    by_prompt: Mapping[str, Tensor]


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a pipeline's call."""
    return inspect.signature(type(pipe).__call__).parameters


def embedded(arguments: Mapping[str, Any]) -> bool:
    """Returns whether the arguments of a call contain prompt embeddings, so that the call takes no prompt."""
    return any(_EMBEDDINGS.match(name) for name in arguments)


def labelled(pipe: Any) -> bool:
    """Returns whether a pipeline draws classes, which means that its call takes class labels and no prompt."""
    parameters = parameters_of(pipe)
    if "class_labels" not in parameters or "prompt" in parameters:
        return False
    return parameters["class_labels"].default is inspect.Parameter.empty or _classes(pipe) is not None


def prompt_arguments(pipe: Any, prompt: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the call for one prompt: `arguments`, and the prompt itself, as text or class label.
    Each `Rows` object among `arguments`, which holds a tensor for each prompt, is replaced by the tensor of this
    prompt.

    Raises UsageError if the pipeline draws classes and the prompt names none, or several.
    """
    call = {name: value.by_prompt[prompt] if isinstance(value, Rows) else value for name, value in arguments.items()}
    if labelled(pipe):
        call["class_labels"] = [class_label(pipe, prompt)]
    elif "prompt" in parameters_of(pipe):
        call["prompt"] = None if embedded(arguments) else prompt
    return call


def rows_of(arguments: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Any]:
    """Returns `arguments`, with a `Rows` object in place of each embedding tensor that has one row for each of
    `prompts`. The object maps each prompt to its row.

    If there is only one prompt, `arguments` stay as they are, and all rows of a tensor belong to it. Raises UsageError
    for embeddings that have neither one row nor one for each prompt.
    """
    split = dict(arguments)
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or not _ROWS.search(name) or value.ndim < 2 or len(prompts) < 2:
            continue
        if len(value) == len(prompts):
            split[name] = Rows({prompt: value[row : row + 1] for row, prompt in enumerate(prompts)})
        elif len(value) != 1:
            fact = f"has {len(value)} rows for {len(prompts)} prompts"
            raise UsageError(f"--arg {name}: {fact}. Give one row, or one for each prompt.")
    return split


def note_on_prompts(pipe: Any, arguments: Mapping[str, Any]) -> str | None:
    """Returns a warning if the pipeline ignores the texts of the prompts, or reads them as names of ImageNet's classes;
    else None. `arguments` are the arguments of its call."""
    kind = type(pipe).__name__
    if labelled(pipe):
        nameless = not _own_names(pipe) and bool(_names(pipe))
        return f"{kind} has no names for its 1000 classes: names are read as those of ImageNet." if nameless else None
    if any(isinstance(value, Rows) for value in arguments.values()):
        return None
    if "prompt" not in parameters_of(pipe):
        return f"{kind} takes no prompt: each prompt only sets the seed of the noise."
    if embedded(arguments):
        return f"{kind} gets the same embeddings for all prompts: each prompt only sets the seed of the noise."
    return None


def class_label(pipe: Any, text: str) -> int:
    """Returns the number of the class that the prompt `text` gives: as a number, or as a name in id2label of `pipe`, in
    small or capital letters.

    Raises UsageError for an unknown number or name, and for a name that several classes have.
    """
    kind, word = type(pipe).__name__, text.strip()
    names = _names(pipe)
    count = _classes(pipe)
    if word.isdecimal():
        if count is not None and int(word) >= count:
            raise UsageError(f"{kind}: there is no class {word}. Choose one of 0 to {count - 1}.")
        return int(word)
    classes = names.get(word.casefold())
    if classes is None:
        parts = [names.get(part.strip().casefold(), set()) for part in word.split(",")]
        classes = set.intersection(*parts)
    if len(classes) == 1:
        return next(iter(classes))
    if classes:
        numbers = " and ".join(map(str, sorted(classes)))
        raise UsageError(f"{kind}: {word!r} is the name of the classes {numbers}. Write the number.")
    near = difflib.get_close_matches(word.casefold(), names, 1)
    remedy = (
        f"Did you mean {near[0]!r}?" if near else "Give a number" + (" or a name" if names else "") + " in each line."
    )
    raise UsageError(f"{kind}: draws classes, and {word[:60]!r} is not one of them. {remedy}")


def _classes(pipe: Any) -> int | None:
    for part, name in (("transformer", "num_embeds_ada_norm"), ("unet", "num_class_embeds")):
        count = getattr(getattr(getattr(pipe, part, None), "config", None), name, None)
        if isinstance(count, int):
            return count
    return None


def _names(pipe: Any) -> dict[str, set[int]]:
    """Returns a dict from name, in small letters, to the numbers of the classes that have it.

    A pipeline with 1000 classes and no names for them gets the names of ImageNet's classes. Such a pipeline is probably
    a DiT, which draws these classes, and whose names are lost when `save_pretrained` writes it.
    """
    pairs = _own_names(pipe)
    if not pairs and _classes(pipe) == 1000:
        pairs = _split(enumerate(_IMAGENET.read_text(encoding="ascii").splitlines()))
    names: dict[str, set[int]] = {}
    for name, number in pairs:
        names.setdefault(name.strip().casefold(), set()).add(int(number))
    return names


def _own_names(pipe: Any) -> list[tuple[str, int]]:
    """Returns the name and number of each class, as id2label in the pipeline's model_index.json has them. If id2label
    is missing, returns those of `pipe.labels`.

    `pipe.labels` comes second because it keeps only the last of several classes that share a name.
    """
    file = Path(str(getattr(pipe, "config", {}).get("_name_or_path") or "")) / "model_index.json"
    labels = read_json(file).get("id2label") if file.is_file() else None
    pairs = _split(labels.items()) if isinstance(labels, Mapping) else []
    return pairs or list((getattr(pipe, "labels", None) or {}).items())


def _split(labels: Iterable[tuple[Any, Any]]) -> list[tuple[str, int]]:
    """Returns pairs of name and class number for `labels`, which are pairs of class number and label. The whole label
    is a name of its class, and so is each part between commas: (1, "goldfish, Carassius auratus") gives three pairs."""
    return [(name, int(number)) for number, label in labels for name in {str(label), *str(label).split(",")}]
