"""Checks which limits a comparison meets, by the estimate and by the bounds of its interval."""

import pytest

from octavo.comparing.gates import Limit, judged_gates
from octavo.page.words import gate_text

TOTALS = {
    "psnr": 40.0, "ssim": None, "lpips": None, "st_lpips": 0.10, "output_sqnr": None, "output_same": False,
    "judged": {"float": 8, "quantized": 8, "of": 8, "samples": 8},
    "intervals": {"psnr": [36.0, None], "st_lpips": [0.05, 0.16], "judged": [0.676, 1.0]},
}  # fmt: skip
PSNR, SSIM = ("psnr",), ("ssim",)
LPIPS = ("lpips", "st_lpips")


def gate(limit: Limit, by: str = "worst", **totals: object) -> dict:
    return judged_gates([limit], TOTALS | totals, by, 8, 16)[0]


@pytest.mark.parametrize(
    ("bar", "passed"),
    [
        (35.0, {"worst", "estimate", "best"}),
        (39.0, {"estimate", "best"}),
        (41.0, {"best"}),
        (36.0, {"worst", "estimate", "best"}),
    ],
)
def test_the_bound_that_is_asked_for_decides(bar, passed):
    assert {by for by in ("worst", "estimate", "best") if gate(Limit("--min-psnr", bar, PSNR), by)["passed"]} == passed
    assert gate(Limit("--min-psnr", bar, PSNR))["settled"] == (bar <= 36.0)


def test_a_highest_value_is_compared_with_the_upper_bound():
    lpips = gate(Limit("--max-lpips", 0.15, LPIPS, at_most=True))
    assert (lpips["key"], lpips["passed"], lpips["settled"]) == ("st_lpips", False, False)
    assert lpips["more"] == 2 * (8 * 36 // 25 + 1 - 8)  # two pairs for each prompt
    assert "ST-LPIPS is 0.1000 (95 % interval 0.0500 to 0.1600), limit at most 0.1500" in gate_text(lpips)
    assert "about 8 more pairs would settle it (estimate)" in gate_text(lpips)
    assert gate(Limit("--max-lpips", 0.15, LPIPS, at_most=True), lpips=0.1)["key"] == "lpips"
    assert gate(Limit("--max-lpips", 0.16, LPIPS, at_most=True))["passed"]


def test_what_was_not_measured_misses_its_limit():
    for limit in (Limit("--min-ssim", 0.1, SSIM), Limit("--min-sqnr", 1.0, ("output_sqnr",))):
        assert not gate(limit, "best")["passed"]
        assert "was not measured" in gate_text(gate(limit))
    assert gate(Limit("--min-sqnr", 1.0, ("output_sqnr",)), output_same=True)["passed"]


def test_equal_pictures_meet_any_psnr_and_one_pair_is_decided_by_its_estimate():
    same = gate(Limit("--min-psnr", 99.0, PSNR), psnr=None, intervals={"psnr": [None, None]})
    assert same["passed"]
    assert same["settled"]
    one = gate(Limit("--min-psnr", 39.0, PSNR), intervals={"psnr": None})
    assert (one["passed"], one["settled"], one["more"], one["by"]) == (True, False, None, "estimate")
    assert "one pair, so there is no interval" in gate_text(one)


def test_a_share_of_eight_of_eight_is_no_proof_of_nine_in_ten():
    judged = gate(Limit("--min-judged", 0.9, ("judged",)))
    assert not judged["passed"]
    assert judged["more"] == 2 * (35 - 8)
    assert gate(Limit("--min-judged", 0.6, ("judged",)))["passed"]
