"""The context of a calibration, passed to all its stages: progress, ranks and stopwatch."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from octavo.capture.ranks import ALONE, Ranks

from ..resources import Stopwatch
from .calls import Progress, T, silent


@dataclass(frozen=True)
class Work:
    """The context of a calibration: `progress` shows how much of a stage (such as smoothing) is done, `ranks` are the
    processes that share the work, `watch` sums the seconds of each stage."""

    progress: Progress = silent
    ranks: Ranks = ALONE
    watch: Stopwatch = field(default_factory=Stopwatch)

    def labelled(self, prefix: str) -> "Work":
        """Returns a copy whose progress labels begin with `prefix`."""

        def shown(label: str, items: Iterable[T], total: int | None = None) -> Iterable[T]:
            return self.progress(f"{prefix}: {label}", items, total)

        return replace(self, progress=shown)
