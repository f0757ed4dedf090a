"""Checks which steps of a run --keep stores."""

import pytest

from octavo.capture.kept_steps import KeptSteps, keep_rule

from ..helpers.refusals import refused


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("all", 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every:3", 0, [0, 3, 6]),
        ("spread:1", 8, [0]),
        ("spread:2", 8, [0, 7]),
        ("spread:3", 8, [0, 4, 7]),
        ("spread:99", 8, list(range(8))),
    ],
)
def test_a_rule_keeps_the_expected_steps(text, steps, expected):
    assert [step for step in range(8) if keep_rule(text).kept(steps)(step)] == expected


@pytest.mark.parametrize("text", ["", "some", "every", "every:0", "every:-1", "every:x", "spread:", "all:2"])
def test_other_texts_are_refused(text):
    refused(lambda: keep_rule(text), 2, "not a rule")


def one_run(kept_steps: KeptSteps, steps: list[int]) -> list[int]:
    """Returns the steps that one run keeps. `steps` has an entry for each call; a step may have several calls."""
    kept_steps.begin()
    return [step for step in steps if kept_steps(step)]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("expected", [0, 3, 6, 20])
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 11])
def test_the_second_run_keeps_the_steps_asked_for_where_the_first_did_not(number, expected, steps):
    kept_steps = KeptSteps(keep_rule(f"spread:{number}"), expected)
    calls = [
        step for step in range(5, 5 + steps) for _ in range(2)
    ]  # two calls a step; the first five steps have no calls
    first = one_run(kept_steps, calls)
    final = one_run(kept_steps, calls) if (again := kept_steps.miscounted()) else first
    assert len(set(final)) == min(number, steps)
    assert final[0] == 5
    assert number == 1 or final[-1] == 5 + steps - 1
    assert again == (first != final)
    kept_steps.begin()
    assert [step for step in calls if kept_steps(step)] == final
    assert not kept_steps.miscounted()


def test_what_the_pipeline_announces_is_believed_until_a_run_has_ended():
    kept_steps = KeptSteps(keep_rule("spread:2"), 20, lambda: 3)
    assert one_run(kept_steps, [0, 1, 2]) == [0, 2]
    assert not kept_steps.miscounted()
    assert one_run(kept_steps, [0, 1, 2, 3]) == [0, 2]
    assert kept_steps.miscounted()
    assert one_run(kept_steps, [0, 1, 2, 3]) == [0, 3]
