"""Checks how the page words ratios and the verdict of a comparison."""

import pytest

from octavo.page.words import size_text, speed_text, verdict


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (0.58, "1.7\u00a0× slower"),
        (3.2, "3.2\u00a0× faster"),
        (0.98, "equally fast"),
        (1.04, "equally fast"),
        (12.3, "12\u00a0× faster"),
    ],
)
def test_a_ratio_is_said_as_what_it_means(ratio, words):
    assert speed_text(ratio) == words
    assert size_text(ratio) == words.replace("faster", "smaller").replace("slower", "larger").replace("fast", "large")


def content(psnr: float | None, passed: list[bool]) -> dict:
    totals = {
        "psnr": psnr, "judged": {"float": 3, "quantized": 2, "of": 4}, "speed": {"ratio": 0.5},
        "size": {"float": 4, "quantized": 2},
    }  # fmt: skip
    gates = [{"key": key, "passed": flag} for key, flag in zip(("psnr", "output_sqnr"), passed, strict=False)]
    return {"totals": totals, "decoded": True, "gates": gates}


def test_a_verdict_says_whether_a_limit_was_missed_and_what_was_found():
    verdicts = [verdict(content(psnr, [])) for psnr in (None, 45.0, 35.0, 25.0, 15.0)]
    assert len({text.partition("(")[0] for text in verdicts}) == 5
    assert all("2 of 4 show" in text and "2.0\u00a0× smaller and 2.0\u00a0× slower" in text for text in verdicts)
    assert all("No limit was set" in text for text in verdicts)
    assert verdict(content(35.0, [True])).startswith("Passed all limits. ")
    assert verdict(content(35.0, [True, False])).startswith("Missed the limit for SQNR. ")
