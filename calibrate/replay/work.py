"""Progress, ranks and stopwatch of a calibration, passed through all its stages."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from octavo.capture.ranks import ALONE, Ranks

from ..resources import Stopwatch
from .calls import Progress, T, silent


@dataclass(frozen=True)
class Work:
    """The context of a calibration: `progress` shows the items done, `ranks` share the work, `watch` sums the seconds
    by stage."""

    progress: Progress = silent
    ranks: Ranks = ALONE
    watch: Stopwatch = field(default_factory=Stopwatch)

    def labelled(self, where: str) -> "Work":
        """A copy whose progress labels begin with `where`."""

        def shown(label: str, items: Iterable[T], total: int | None = None) -> Iterable[T]:
            return self.progress(f"{where}: {label}", items, total)

        return replace(self, progress=shown)
