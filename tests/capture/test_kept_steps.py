"""Which steps are kept."""

import pytest

from octavo.capture.kept_steps import keep_rule

from ..helpers.refusals import refused


@pytest.mark.parametrize(
    ("text", "steps", "kept"),
    [
        ("all", 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every:3", 0, [0, 3, 6]),
        ("spread:1", 8, [0]),
        ("spread:2", 8, [0, 7]),
        ("spread:3", 8, [0, 4, 7]),
        ("spread:99", 8, list(range(8))),
    ],
)
def test_rules(text, steps, kept):
    assert [step for step in range(8) if keep_rule(text, steps)(step)] == kept


@pytest.mark.parametrize("text", ["", "some", "every", "every:0", "every:-1", "every:x", "spread:", "all:2"])
def test_other_texts_are_refused(text):
    refused(lambda: keep_rule(text, 8), 2, "not a rule")


def test_spread_needs_the_number_of_steps():
    refused(lambda: keep_rule("spread:4", 0), 2, "does not say")
