"""Reads the options of a command from a TOML file.

Options have the same names as on the command line; click's types check their values.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from octavo.capture.errors import UsageError
from octavo.capture.sealed import read_bytes

from ..declarations import parameters_of
from .calibrate_options import CalibrateOptions
from .early import need

_LIMIT = 1 << 20  # bytes: largest file that is read; a file of options has a few hundred bytes

# (click type, accepted Python types of a TOML value, name of the type): click itself would convert any text
_KINDS: tuple[tuple[type[click.ParamType], tuple[type, ...], str], ...] = (
    (type(click.BOOL), (bool,), "true or false"),
    (type(click.INT), (int,), "a whole number"),
    (type(click.FLOAT), (int, float), "a number"),
    (click.ParamType, (str,), "a string"),
)


def read_config(path: Path | str, parameters: Iterable[click.Parameter] | None = None) -> dict[str, Any]:
    """Returns the values in the TOML file at `path`, as a dict from the names of `parameters` to values. Click takes
    this dict as `default_map`.

    Names in the file may have hyphens or underscores. `parameters` are by default those of `octavo calibrate`. Raises
    FileError if the file cannot be read. Raises UsageError if there is no file, if the file is not TOML, if it gives an
    option that is unknown or gives an option twice, and if an option does not accept its value.
    """
    path = Path(path)
    need(path, "file", "Give a TOML file of options")
    try:
        entries = tomllib.loads(read_bytes(path, _LIMIT).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8. Save it as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: is not valid TOML: {error}. Correct the file.") from error
    options = options_by_name(parameters_of(CalibrateOptions) if parameters is None else parameters)
    values: dict[str, Any] = {}
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name not in options:
            raise UsageError(f"{path}: unknown option '{key}'; {_nearest(name, options)}")
        argument = str(options[name].name)
        if argument in values:
            raise UsageError(f"{path}: '{key}' is given twice. Give it once.")
        values[argument] = _converted(f"{path}: {key}", value, options[name])
    return values


def options_by_name(parameters: Iterable[click.Parameter]) -> dict[str, click.Option]:
    """Returns a dict from the name that an option has in a TOML file, such as max_shard_size for --max-shard-size, to
    the option, for all options among `parameters`."""
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    return {max(option.opts, key=len).lstrip("-").replace("-", "_"): option for option in options}


def _nearest(name: str, options: Mapping[str, click.Option]) -> str:
    """Returns the end of a message on the unknown option `name`: the option with the most similar name, or, if no name
    is similar, the names of all `options`."""
    near = difflib.get_close_matches(name, options, 1)
    return f"did you mean '{near[0]}'?" if near else f"the options are {', '.join(options)}."


def _converted(place: str, value: Any, option: click.Option) -> Any:
    """Returns `value`, from a TOML file, converted to the type of `option`. Raises UsageError if the option does not
    accept it; the message starts with `place`, the path of the file and the name of the option."""
    kinds, noun = next((kinds, noun) for kind, kinds, noun in _KINDS if isinstance(option.type, kind))
    values = value if option.multiple and isinstance(value, list) else [value]
    if not all(type(item) in kinds for item in values):
        raise UsageError(f"{place}: {value!r} is not {'a list of strings' if option.multiple else noun}. Correct it.")
    try:
        return option.type_cast_value(click.Context(click.Command(None)), values if option.multiple else value)
    except click.BadParameter as error:
        raise UsageError(f"{place}: {error.message} Correct it.") from error
