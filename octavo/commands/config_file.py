"""Options from a TOML file: the same names as on the command line, checked here with the file's name in front."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from octavo.calibrate.observers.observers import OBSERVERS
from octavo.calibrate.rounding.methods import WEIGHT_METHODS
from octavo.calibrate.settings import RECIPES
from octavo.capture.errors import OctavoError, UsageError
from octavo.capture.sealed import read_bytes

_LIMIT = 1 << 20


class Option(NamedTuple):
    """What a value has to be: its type, and the numbers or words it may be; `argument` is what the program calls it."""

    kind: type
    within: tuple[float, float] | None = None
    words: tuple[str, ...] = ()
    argument: str = ""


def read_config(path: Path | str, options: Mapping[str, Option] | None = None) -> dict[str, Any]:
    """The options in a file, by argument; lists as tuples. Names may have hyphens, as on the command line.

    Raises FileError for a file that cannot be read, UsageError for what is in it.
    """
    path, options = Path(path), OPTIONS if options is None else options
    try:
        found = tomllib.loads(read_bytes(path, _LIMIT).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8. Save it as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}. Correct it.") from error
    made: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in options:
            raise UsageError(f"{path}: unknown option '{key}'; {_near(name, options)}")
        argument = options[name].argument or name
        if argument in made:
            raise UsageError(f"{path}: '{key}' is given twice. Give it once.")
        made[argument] = checked(f"{path}: {key}", value, options[name])
    return made


def _near(name: str, options: Mapping[str, Option]) -> str:
    near = difflib.get_close_matches(name, options, 1)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(options)}."


def checked(place: str, value: Any, option: Option) -> Any:
    """The value, if it is what the option wants; UsageError naming `place` otherwise."""
    if option.kind is tuple:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
            raise _wrong(place, value, "a list of strings")
        for each in values:
            _check_word(place, each, option)
        return tuple(values)
    fitting = (int, float) if option.kind is float else (option.kind,)
    if type(value) not in fitting:  # a bool is no number here
        raise _wrong(
            place, value, {int: "a whole number", float: "a number", bool: "true or false"}.get(option.kind, "")
        )
    if option.within and not option.within[0] <= value <= option.within[1]:
        low, high = option.within
        raise UsageError(f"{place}: {value} is outside {low:g} to {high:g}. Give a number in it.")
    if isinstance(value, str):
        _check_word(place, value, option)
    return option.kind(value)


def _check_word(place: str, word: str, option: Option) -> None:
    if option.words and word not in option.words:
        raise UsageError(f"{place}: no '{word}'. Choose one of {', '.join(option.words)}.")


def _wrong(place: str, value: Any, wanted: str) -> OctavoError:
    return UsageError(f"{place}: {value!r} is not {wanted or 'a string'}. Correct it.")


OPTIONS: dict[str, Option] = {
    "pipeline": Option(str, words=("cnn",)),
    "images": Option(str),
    "input_shape": Option(str),
    "model": Option(str),
    "component": Option(str),
    "accuracy": Option(str, words=tuple(RECIPES)),
    "observer": Option(str, words=tuple(OBSERVERS)),
    "activations": Option(str, words=("static", "timestep", "dynamic")),
    "smoothing": Option(bool),
    "weights": Option(tuple, words=tuple(WEIGHT_METHODS)),
    "bias_correction": Option(bool),
    "sigma": Option(float, within=(0, 100)),
    "symmetric": Option(bool),
    "weight_only": Option(bool),
    "keep_float": Option(tuple),
    "quantize": Option(tuple, argument="quantize_too"),
    "budget": Option(str),
    "samples": Option(int, within=(1, 1 << 40)),
    "memory": Option(str),
    "format": Option(str, argument="formats"),
    "max_shard_size": Option(str),
    "overwrite": Option(bool),
    "allow_incomplete": Option(bool),
    "allow_revision": Option(bool),
    "device": Option(str),
    "dtype": Option(str, words=("float32", "float16", "bfloat16")),
    "group_readable": Option(bool),
    "trust_remote_code": Option(bool),
}
