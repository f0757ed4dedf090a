"""What a calibration works with, from the first replay to the report."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from octavo.capture.ranks import ALONE, Ranks

from ..resources import Stopwatch
from .calls import Progress, T, silent


@dataclass(frozen=True)
class Work:
    """`progress` shows how far it is, `ranks` are the processes that share it, `watch` sums its seconds by stage."""

    progress: Progress = silent
    ranks: Ranks = ALONE
    watch: Stopwatch = field(default_factory=Stopwatch)

    def labelled(self, where: str) -> "Work":
        """The same work, whose progress says `where` first."""

        def shown(label: str, items: Iterable[T], total: int | None = None) -> Iterable[T]:
            return self.progress(f"{where}: {label}", items, total)

        return replace(self, progress=shown)
