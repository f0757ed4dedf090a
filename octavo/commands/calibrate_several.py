"""`octavo calibrate` of a pipeline with several denoisers: what is finished is kept until OUT can be whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic

from octavo.calibrate.formats.target import check_target
from octavo.calibrate.result import Result
from octavo.capture.files import Modes, clean, make_directory, replace_directory
from octavo.capture.locks import lock
from octavo.capture.ranks import Ranks
from octavo.capture.sealed import digest_of
from octavo.capture.store.reader import Capture

from .. import __version__
from ..checkpoints import is_checkpoint
from ..terminal import Terminal
from .calibrate_options import CalibrateOptions
from .calibrate_output import show

_NAME = 40  # characters of OUT's name that the name of its parts begins with: a name has at most 255 bytes
# options that do not change what is written
_ELSEWHERE = {"capture", "out", "overwrite", "device", "memory"}


def calibrate_all(
    capture: Capture,
    names: list[str],
    options: CalibrateOptions,
    calibrate: Callable[[str, CalibrateOptions], Result],
    terminal: Terminal,
    ranks: Ranks,
) -> None:
    """Calibrates several denoisers, each into the folder of OUT with its name. OUT is whole or as before.

    Until all are done they are in a directory beside OUT, from where a later run with the same options takes them.
    """
    target = check_target(options.out, overwrite=options.overwrite) if ranks.rank == 0 else options.out
    parts = _parts(target, capture, options)
    with _held(parts, options, terminal, ranks):
        finished = ranks.first([name for name in names if is_checkpoint(parts / name)])
        for name in names:
            if name in finished:
                terminal.say(f"{options.out / name}: an earlier run finished {name} ({parts / name}).")
                continue
            began = monotonic()
            result = calibrate(name, replace(options, out=parts / name, overwrite=True))
            ranks.wait()
            show(result, replace(options, out=options.out / name), terminal, monotonic() - began, ranks)
    if ranks.rank == 0:
        replace_directory(parts, target, Modes(options.group_readable).directory)


def _parts(target: Path, capture: Capture, options: CalibrateOptions) -> Path:
    """The directory beside `target` for the finished denoisers of this capture with these options."""
    chosen = {name: value for name, value in asdict(options).items() if name not in _ELSEWHERE}
    asked = (__version__, capture.manifest, [unit.digest for unit in capture.units], chosen)
    return target.with_name(f"{target.name[:_NAME]}.unfinished-{digest_of(repr(asked).encode())[:8]}")


@contextmanager
def _held(parts: Path, options: CalibrateOptions, terminal: Terminal, ranks: Ranks) -> Iterator[None]:
    """Inside, the directory of the parts is this run's. If the run fails, it stays when it holds a finished part."""
    if ranks.rank:
        yield
        return
    if not parts.exists():
        make_directory(parts, Modes(options.group_readable).directory)
    held = lock(parts)
    try:
        clean(parts)
        yield
    except BaseException:
        if done := sorted(place.name for place in parts.iterdir() if is_checkpoint(place)):
            terminal.warn(f"{parts}: {' and '.join(done)} finished and kept. The same command goes on from there.")
        raise
    finally:
        held.release()
        with suppress(OSError):
            parts.rmdir()
