"""Chooses which denoising steps of a run are stored."""

from collections.abc import Callable
from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class KeepRule:
    """A rule that says which steps of a run are stored: all, every:N or spread:N.

    every:N stores the steps 0, N, 2N, ...; spread:N stores N steps, evenly spaced from the first to the last. `kind` is
    the word before the colon, and `number` is N.
    """

    kind: str
    number: int = 1

    def kept(self, steps: int) -> Callable[[int], bool]:
        """Returns a function that takes the number of a step, counted from 0, and returns whether the step is stored.

        `steps` is the number of steps of the run; only the rule spread:N depends on it.
        """
        if self.kind != "spread":
            return lambda step: step % self.number == 0
        last = max(0, steps - 1)
        chosen = {round(position * last / max(1, self.number - 1)) for position in range(self.number)}
        return lambda step: step < steps and step in chosen


def keep_rule(text: str) -> KeepRule:
    """Parses the rule in `text`: all, every:N or spread:N. Raises UsageError for any other text."""
    kind, _, number = text.partition(":")
    if text == "all":
        return KeepRule("all")
    if kind not in ("every", "spread") or not number.isdecimal() or int(number) < 1:
        raise UsageError(f"--keep: '{text}' is not a rule. Use all, every:N or spread:K.")
    return KeepRule(kind, int(number))


class KeptSteps:
    """Chooses by `rule` which denoising steps to store in a series of runs of a pipeline, one run for each prompt.

    The number of steps of a run, on which the rule may depend, is only certain when the run ends. The first run is
    expected to have `expected` steps, each later run as many as the run before. When the first run first calls the
    denoiser, `announced` is called, and returns the number of steps that the pipeline reports, which replaces
    `expected`, or None. If `miscounted` returns True at the end of a run, the stored steps are not those that the rule
    requires, and the run has to be repeated. Only steps in which the denoiser is called are counted.
    """

    def __init__(self, rule: KeepRule, expected: int, announced: Callable[[], int | None] = lambda: None) -> None:
        self.rule, self.expected = rule, expected
        self.count = 0  # steps of the current run so far
        self._announced: Callable[[], int | None] = announced
        self._step: int | None = None
        self._kept = rule.kept(0)

    def begin(self) -> None:
        """Starts counting the steps of the next run."""
        self.count, self._step = 0, None
        self._kept = self.rule.kept(self.expected)

    def __call__(self, step: int) -> bool:
        """Returns whether to store a call of the current run. `step` is the number of the call's denoising step."""
        if self._step is None and (steps := self._announced()):
            self.expected = steps
            self._kept = self.rule.kept(steps)
        if step != self._step:
            self.count += 1
            self._step = step
        return self._kept(self.count - 1)

    def miscounted(self) -> bool:
        """Ends the run. Returns True if the steps that were stored are not those that the rule requires for a run of
        this length."""
        self.expected, self._announced = self.count, lambda: None
        required = self.rule.kept(self.count)
        return any(required(step) != self._kept(step) for step in range(self.count))
