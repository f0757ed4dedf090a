"""Finds the formats that a checkpoint is written in, and checks for each format whether the software for it can load
the files."""

from pathlib import Path

from . import TABLE, format_named
from .record import Format
from .verdict import Verdict

DEFAULT = "ascend"  # the format that a directory is checked for if it holds no files of any format


def shown_formats() -> list[Format]:
    """Returns the `Format` objects of the formats that `octavo inspect` looks for in a checkpoint."""
    return [record for name in TABLE if (record := format_named(name)).shown]


def views(directory: Path) -> dict[str, Path]:
    """Returns a dict from the name of each format in the checkpoint in `directory` to the path of its files:
    `directory` itself, or a subfolder named after the format."""
    paths = {record.name: record.find(directory) for record in shown_formats()}
    return {name: path for name, path in paths.items() if path is not None}


def quantized_parts(pipeline: Path) -> list[Path]:
    """Returns the subfolders of a diffusers pipeline that hold a component quantized in a format such as `diffusers` or
    `torchao`. Octavo has no reader for such a format (`Format.read` is None), because other software loads it.
    `pipeline` is the directory of the pipeline."""
    folders = [path for path in sorted(pipeline.iterdir()) if path.is_dir()]
    return [folder for folder in folders if any(format_named(name).read is None for name in views(folder))]


def check(directory: Path | str) -> list[Verdict]:
    """Returns the verdicts on the checkpoint in `directory`. The first verdicts are on the formats that are found in
    it.

    Verdicts on other formats that `octavo inspect` looks for follow. They say whether the consumer of the format (the
    software that loads the format) can load the files that are there, or that the format is missing. A consumer that
    already has a verdict gets no further one. If `directory` has no files of any format, only the format `ascend`
    (DEFAULT) is checked. A file that cannot be read gives a negative verdict, not an error.
    """
    directory = Path(directory)
    paths = views(directory)
    verdicts = [
        verdict for name, path in (paths or {DEFAULT: directory}).items() for verdict in format_named(name).check(path)
    ]
    judged = {verdict.consumer for verdict in verdicts}
    absent = [record for record in shown_formats() if paths and not {record.name, record.consumer} & {*paths, *judged}]
    return verdicts + [verdict for record in absent for verdict in record.foreign(directory) or [_missing(record)]]


def _missing(record: Format) -> Verdict:
    return Verdict(record.consumer, "files", False, f"not in this checkpoint. Calibrate with --format {record.name}")


def sound(verdicts: list[Verdict], names: set[str]) -> bool:
    """Returns whether a checkpoint is sound: True if all `verdicts` of Octavo itself, and all on software that loads
    one of the checkpoint's formats, are positive. Verdicts on other software do not count. Verdicts on a subject that
    the format lists in `optional`, such as "in bfloat16" for `ascend`, do not count either.

    `names` are the checkpoint's formats; an empty set stands for `ascend`.
    """
    records = [format_named(name) for name in names or {DEFAULT}]
    pairs = [(record, consumer) for record in records for consumer in (record.consumer, *record.also)]
    consumers = {"octavo", *(consumer for _, consumer in pairs)}
    optional = {(consumer, subject) for record, consumer in pairs for subject in record.optional}
    return all(v.ok for v in verdicts if v.consumer in consumers and (v.consumer, v.subject) not in optional)
