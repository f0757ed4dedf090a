"""The surveys of several processes become one."""

from collections.abc import Mapping

from octavo.capture.ranks import Ranks

from ..replay.current_call import Turn
from .survey import Survey


def united(turn: Turn, surveys: Mapping[str, Survey], ranks: Ranks) -> tuple[Turn, dict[str, Survey]]:
    """What all ranks know, of calls that they shared: as one process knows it that heard all of them. Collective.

    No more rows are moved than are kept of all.
    """
    sizes = ranks.gather({name: [sample.sizes() for sample in each.samples] for name, each in surveys.items()})
    for name, survey in surveys.items():
        for at, sample in enumerate(survey.samples):
            sample.thin([each[name][at] for each in sizes])
    bare = {name: survey.copy(None) for name, survey in surveys.items()}  # type: ignore[arg-type]
    parts = ranks.gather((turn.samples, turn.levels, bare))
    joined = turn.joined(sum(part[0] for part in parts), [level for part in parts for level in part[1]])
    made = {name: survey.copy(joined) for name, survey in parts[0][2].items()}
    for _, _, others in parts[1:]:
        for name, survey in made.items():
            survey.merge(others[name])
    return joined, made
