"""Runs `octavo calibrate` for a pipeline with several denoisers. If the calibration of one fails, OUT is not written,
and the checkpoints that are finished are kept for the next run."""

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

# characters of OUT's name with which the name of the unfinished directory begins: file systems allow 255 bytes
_NAME = 40
# options that do not change the contents of OUT, so that a later run may change them and still continue
_IRRELEVANT = {"capture", "out", "overwrite", "device", "memory"}


def calibrate_all(
    capture: Capture,
    names: list[str],
    options: CalibrateOptions,
    calibrate: Callable[[str, CalibrateOptions], Result],
    terminal: Terminal,
    ranks: Ranks,
) -> None:
    """Calibrates the denoisers `names` of `capture` one after the other, and writes the checkpoint of each into a
    subfolder of OUT that is called like the denoiser. The function `calibrate` calibrates one denoiser; it gets the
    denoiser's name and the options for it.

    Until all denoisers are calibrated, their checkpoints are in a directory beside OUT. So OUT is written as a whole or
    stays as it was, and a later run with the same options reuses the checkpoints that are finished.
    """
    target = check_target(options.out, overwrite=options.overwrite) if ranks.rank == 0 else options.out
    parts = _unfinished_directory(target, capture, options)
    with _locked_directory(parts, options, terminal, ranks):
        finished = ranks.first([name for name in names if is_checkpoint(parts / name)])
        for name in names:
            if name in finished:
                terminal.say(f"{options.out / name}: uses {parts / name}, which an earlier run finished.")
                continue
            began = monotonic()
            result = calibrate(name, replace(options, out=parts / name, overwrite=True))
            ranks.wait()
            show(result, replace(options, out=options.out / name), terminal, monotonic() - began, ranks)
    if ranks.rank == 0:
        replace_directory(parts, target, Modes(options.group_readable).directory)


def _unfinished_directory(target: Path, capture: Capture, options: CalibrateOptions) -> Path:
    """Returns the path of a directory beside `target`, the directory to write. It holds the finished checkpoints until
    the checkpoints of all denoisers are finished. The path depends on the version of Octavo, the capture, and the
    options that change the result."""
    relevant = {name: value for name, value in asdict(options).items() if name not in _IRRELEVANT}
    identity = (__version__, capture.manifest, [unit.digest for unit in capture.units], relevant)
    return target.with_name(f"{target.name[:_NAME]}.unfinished-{digest_of(repr(identity).encode())[:8]}")


@contextmanager
def _locked_directory(parts: Path, options: CalibrateOptions, terminal: Terminal, ranks: Ranks) -> Iterator[None]:
    """Makes the directory `parts`, locks it while the body of `with` runs, and then unlocks it. Only the first of
    `ranks` does so; for the other ranks nothing happens.

    When the body ends, also by an exception, the directory is removed if it is empty. If an exception ends the body and
    `parts` holds finished checkpoints, a warning says how to continue. `options.group_readable` decides whether the
    user's group may read the directory.
    """
    if ranks.rank:
        yield
        return
    if not parts.exists():
        make_directory(parts, Modes(options.group_readable).directory)
    directory_lock = lock(parts)
    try:
        clean(parts)
        yield
    except BaseException:
        if finished := sorted(place.name for place in parts.iterdir() if is_checkpoint(place)):
            names = " and ".join(finished)
            terminal.warn(f"{parts}: holds {names}, already calibrated. Run the same command again to continue.")
        raise
    finally:
        directory_lock.release()
        with suppress(OSError):
            parts.rmdir()
