"""Declares the options of a command once: as fields of a dataclass, from which click's parameters are made.

    @dataclass(frozen=True, kw_only=True)
    class Options:
        path: Path = argument()
        samples: int | None = option("Replay this many calls.", type=click.IntRange(1))  # --samples
        overwrite: bool = flag("Replace the file.", heading="Files")  # --overwrite

An option gets its name and its default from the field. Without the argument `type`, it also gets its click type from
the field's annotation.
"""

from collections.abc import Collection
from dataclasses import MISSING, field, fields
from inspect import get_annotations
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import click

_TYPES = {Path: click.Path(path_type=Path), str: click.STRING, int: click.INT, float: click.FLOAT}


class Option(click.Option):
    """An option of a command. With a `heading`, only --help-all lists the option, under that heading; without one,
    --help lists it too."""

    def __init__(self, *args: Any, heading: str = "", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading = heading


class Within(click.FloatRange):
    """The type of an option whose value is a number in a closed interval. Unlike `click.FloatRange` it refuses NaN, for
    which `x < low` and `x > high` are both false."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__(low, high)
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = click.FLOAT.convert(value, param, ctx)
        if not self.low <= number <= self.high:
            self.fail(f"{number:g} is outside {self.low:g} to {self.high:g}.", param, ctx)
        return number


def argument(**attributes: Any) -> Any:
    """Declares a field as an argument of the command line. `attributes` are keyword arguments of `click.Argument`, such
    as metavar."""
    return field(metadata={"argument": attributes})


def option(help: str, *names: str, default: Any = None, **attributes: Any) -> Any:
    """Declares a field as an option, with the text `help` in --help. The option has the name of the field, with hyphens
    as in --max-shard-size, unless `names` has other names.

    `attributes` are further arguments of `Option`. With `required=True` the field has no default.
    """
    metadata = {"option": (names, {"help": help, **attributes})}
    return field(default=MISSING if attributes.get("required") else default, metadata=metadata)


def flag(help: str, *names: str, **attributes: Any) -> Any:
    """Declares a bool field as an option without a value: the field is True if the option is on the command line.

    `help` is the option's text in --help. The option has the name of the field, unless `names` has other names.
    `attributes` are further arguments of `Option`.
    """
    return option(help, *names, default=False, is_flag=True, **attributes)


def several(help: str, *names: str, **attributes: Any) -> Any:
    """Declares a field of type tuple[str, ...] as an option that may be repeated.

    `help` is the option's text in --help. The option has the name of the field, unless `names` has other names.
    `attributes` are further arguments of `Option`.
    """
    return option(help, *names, default=(), multiple=True, **attributes)


def parameters_of(options: type, without: Collection[str] = ()) -> list[click.Parameter]:
    """Returns the parameters that the fields of the dataclass `options` declare: first the fields of the class itself,
    then those of its base classes.

    The fields named in `without` get no parameter and so keep their defaults.
    """
    declared = {item.name: item for item in fields(options)}
    names = dict.fromkeys(name for kind in options.__mro__ for name in get_annotations(kind))
    hints = get_type_hints(options)
    return [
        parameter
        for name in names
        if name in declared and name not in without
        for parameter in _parameter(name, declared[name].metadata, declared[name].default, hints[name])
    ]


def _parameter(name: str, metadata: Any, default: Any, hint: Any) -> list[click.Parameter]:
    """Returns a list of the one click parameter that the field `name` of a dataclass declares, or [] if the field is
    neither an option nor an argument. `metadata` is what `argument`, `option`, `flag` or `several` stored in the field,
    `default` is the field's default, and `hint` its type."""
    kind = next(kind for kind in get_args(hint) or (hint,) if kind is not NoneType)
    if "argument" in metadata:
        return [click.Argument([name], **{"type": _TYPES.get(kind)} | metadata["argument"])]
    if "option" not in metadata:
        return []
    names, attributes = metadata["option"]
    inferred: dict[str, Any] = {"type": _TYPES.get(kind)}
    if default is not MISSING:
        inferred |= {"default": default, "show_default": type(default) is not bool and default not in (None, "", ())}
    return [Option([name, *(names or ("--" + name.replace("_", "-"),))], **inferred | attributes)]
