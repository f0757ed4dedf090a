"""The causes of errors are printed as shares, by kind of layer and by noise level."""

from typing import Any

import pytest

from octavo.calibrate.error_causes import CAUSES
from octavo.commands.causes_output import show_causes
from octavo.terminal import Terminal

SHARES = [3e-4, 0.0, 1e-4, 0.0, -1e-9]
ROW = {"layers": 1, "error": 4e-4, "shares": SHARES}
SECTION: dict[str, Any] = {
    "calls": 3, "held_out": True, "names": list(CAUSES),
    "layers": [{"name": "a", "kind": "feed-forward", "error": 4e-4, "shares": SHARES}],
    "kinds": [{"kind": "feed-forward", **ROW}],
    "levels": [{"low": None, "high": 500.0, **ROW}, {"low": 500.0, "high": None, **ROW}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def shown(rows: list[dict[str, Any]], capsys: Any) -> str:
    show_causes({"causes": SECTION, "layers": rows}, Terminal())
    return str(capsys.readouterr().out)


def test_shares_of_the_error_by_kind_and_noise_level(capsys):
    text = shown([{"name": "a", "output_share": 0.4}], capsys)
    assert "on 3 held-out calls" in text
    assert [word in text for word in ("34.0 dB", "75%", "25%", "40%", "below 500", "from 500")] == [True] * 6
    assert "-0%" not in text


def test_without_an_estimate_there_is_no_column_of_the_output_s_error(capsys):
    assert "output" not in shown([{"name": "a"}], capsys)
