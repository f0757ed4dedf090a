"""The table of quantized attention shows the worst modules, and a line says how many reach the bound."""

import json

from octavo.calibrate.attention.choice import attention_section
from octavo.calibrate.attention.measure import AttentionRow
from octavo.calibrate.attention.names import ATTENTION_TYPES
from octavo.commands.attention_output import show_attention
from octavo.terminal import Terminal


def section() -> dict:
    rows = [
        AttentionRow(f"blocks.{index}.attn", type, rotation, 8, (50.0, 30.0 + index), "no" if index == 1 else None)
        for index in range(12)
        for type in ATTENTION_TYPES
        for rotation in ("none", "hadamard")
    ]
    return attention_section(rows, 2, 40.0)


def test_the_worst_modules_come_first_and_refused_numbers_have_a_star(capsys):
    show_attention(section(), Terminal(), most=3)
    text = capsys.readouterr().out
    assert [f"blocks.{index}.attn" in text for index in range(4)] == [True, True, True, False]
    assert "30.0 dB (head 1)" in text
    assert "31.0 dB (head 1) *" in text
    assert "FP8_DYNAMIC, rotated" in text
    assert "2 FP8_DYNAMIC of 12 modules with at least 40 dB" in text


def test_json_gets_the_whole_section(capsys):
    show_attention(section(), Terminal(as_json=True))
    assert json.loads(capsys.readouterr().out) == {"event": "attention", **section()}
