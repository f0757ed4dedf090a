"""Gives a command two pages of help: --help lists the options that people need first, --help-all lists all options
under headings. Both end with examples. Groups the commands in the help of `octavo`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import click

_ALL = "octavo.help_all"  # key in `click.Context.meta`: if set, all options are listed
_WIDE = 90  # columns of the terminal from which on the column of option names is _NAMES_WIDE, which saves lines
_NAMES, _NAMES_WIDE = 30, 38  # width of the column of option names; a longer name gets a line of its own


def _show_all(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        context.meta[_ALL] = True
        click.echo(context.get_help(), color=context.color)
        context.exit()


class Command(click.Command):
    """A command with two pages of help, --help and --help-all. An option with a `heading` is only on the long page,
    --help-all, under this heading. A command without such options has no --help-all. `examples` are command lines that
    both pages show at the end."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)
        options = [item for item in self.params if isinstance(item, click.Option) and not item.hidden]
        if any(getattr(option, "heading", "") for option in options):
            count = len(options) + 2  # and --help and --help-all
            show = click.Option(
                ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all,
                help=f"Show all {count} options.",
            )  # fmt: skip
            self.params.append(show)

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        from .terminal import parsing

        with parsing():
            return super().make_context(*args, **options)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of options: for --help those without a heading, for --help-all all of them."""
        sections: dict[str, list[tuple[str, str]]] = {"": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "heading", ""), []).append(record)
        for heading, records in sections.items():
            if not heading or ctx.meta.get(_ALL):
                with formatter.section(heading or "Options"):
                    formatter.write_dl(records, col_max=_NAMES_WIDE if formatter.width >= _WIDE else _NAMES)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples, each on a line of its own."""
        write_lines(formatter, "Examples", self.examples)


def write_lines(formatter: click.HelpFormatter, heading: str, lines: Sequence[str]) -> None:
    """Writes `lines` as they are, without wrapping them, under `heading`. Writes nothing if there are none."""
    if lines:
        with formatter.section(heading):
            for line in lines:
                formatter.write(f"{' ' * formatter.current_indent}{line}\n")


class Grouped(click.Group):
    """A group whose help lists its commands under headings. `headings` maps a heading to the names of its commands;
    every command has to have a heading."""

    headings: ClassVar[Mapping[str, Sequence[str]]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of the commands in the order of `headings`."""
        return [name for names in self.headings.values() for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands with their short help, under the headings."""
        width = max(map(len, self.commands))
        for heading, names in self.headings.items():
            with formatter.section(heading):
                rows = [(name.ljust(width), self.commands[name].get_short_help_str(limit=90)) for name in names]
                formatter.write_dl(rows)
