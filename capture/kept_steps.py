"""Chooses the denoising steps of a run that are stored."""

from collections.abc import Callable
from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class KeepRule:
    """A rule that keeps steps of a run: `all`, `every` (steps 0, N, 2N, ...) or `spread` (N steps from the first to the
    last, spaced evenly), where N is `number`."""

    kind: str
    number: int = 1

    def kept(self, steps: int) -> Callable[[int], bool]:
        """Whether a step of a run of `steps` is kept. The answer depends on `steps` for `spread` alone."""
        if self.kind != "spread":
            return lambda step: step % self.number == 0
        last = max(0, steps - 1)
        chosen = {round(place * last / max(1, self.number - 1)) for place in range(self.number)}
        return lambda step: step < steps and step in chosen


def keep_rule(text: str) -> KeepRule:
    """The rule in `text`: all, every:N or spread:N. Raises UsageError for any other text."""
    kind, _, number = text.partition(":")
    if text == "all":
        return KeepRule("all")
    if kind not in ("every", "spread") or not number.isdecimal() or int(number) < 1:
        raise UsageError(f"--keep {text}: not a rule. Use all, every:N or spread:K.")
    return KeepRule(kind, int(number))


class KeptSteps:
    """Chooses the steps to keep of one run after the other, where a run tells its number of steps only at its end.

    Only steps in which a call is recorded count, from 0. Each run is `expected` to have as many as the one before; a
    run that `miscounted` has kept other steps than the rule asks for, and has to be run again.
    `announced` gives what the pipeline says at the first call of its first run, None where it says nothing.
    """

    def __init__(self, rule: KeepRule, expected: int, announced: Callable[[], int | None] = lambda: None) -> None:
        self.rule, self.expected = rule, expected
        self.count = 0  # steps of the current run so far
        self._announced: Callable[[], int | None] = announced
        self._step: int | None = None
        self._kept = rule.kept(0)

    def begin(self) -> None:
        """Begins a run."""
        self.count, self._step = 0, None
        self._kept = self.rule.kept(self.expected)

    def __call__(self, step: int) -> bool:
        """Whether a call of the current run is kept, which is made in `step`, as a Clock counts."""
        if self._step is None and (said := self._announced()):
            self.expected = said
            self._kept = self.rule.kept(said)
        if step != self._step:
            self.count += 1
            self._step = step
        return self._kept(self.count - 1)

    def miscounted(self) -> bool:
        """Ends a run: whether other steps were kept than the rule asks for in a run of this length."""
        self.expected, self._announced = self.count, lambda: None
        asked = self.rule.kept(self.count)
        return any(asked(step) != self._kept(step) for step in range(self.count))
