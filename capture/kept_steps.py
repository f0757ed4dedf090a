"""Chooses the denoising steps of a run that are stored."""

from collections.abc import Callable

from .errors import UsageError


def keep_rule(text: str, steps: int) -> Callable[[int], bool]:
    """The rule by which `text` keeps steps of a run of `steps` (0: not known): `all`, `every:N` (0, N, 2N, ...), or
    `spread:K` (K steps from the first to the last, spaced evenly).

    Raises UsageError for any other text, and for `spread` where the number of steps is not known.
    """
    kind, _, number = text.partition(":")
    if text == "all":
        return lambda step: True
    if kind not in ("every", "spread") or not number.isdecimal() or int(number) < 1:
        raise UsageError(f"--keep {text}: not a rule. Use all, every:N or spread:K.")
    count = int(number)
    if kind == "every":
        return lambda step: step % count == 0
    if steps < 1:
        raise UsageError(f"--keep {text}: this pipeline does not say how many steps it takes. Use every:N.")
    chosen = {round(i * (steps - 1) / max(1, count - 1)) for i in range(count)}
    return chosen.__contains__
