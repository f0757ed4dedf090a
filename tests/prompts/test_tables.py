"""Checks that the prompts of a table file are found, or that the file is refused with advice."""

import json
from pathlib import Path

import pytest

from octavo.prompts import read_prompts

from ..helpers.refusals import refused

READ = {
    "parti.tsv": ("Prompt\tCategory\tNote\na red cube\tIllustrations\t\na fox\tPeople\t\n", (2, 3)),
    "upper.TSV": ("PROMPTS\na red cube\na fox\n", (2, 3)),
    "drawbench.csv": ('Prompts,Category\n"a red cube",Colors\n\na fox,Animal\n', (2, 4)),
    "excel.csv": ("\ufeffid;Text Prompt\r\n1;a red cube\r\n2;a fox\r\n", (2, 3)),
    "pandas.csv": (",caption\n0,a red cube\n1,a fox\n", (2, 3)),
    "strings.json": (json.dumps(["a red cube", "a fox"]), (1, 2)),
    "vbench.json": (json.dumps([{"prompt_en": p, "dimension": ["color"]} for p in ("a red cube", "a fox")]), (1, 2)),
    "columns.json": (json.dumps({"Prompt": ["a red cube", "a fox"], "id": [1, 2]}), (1, 2)),
    "by-id.json": (json.dumps({"01": {"prompt": "a red cube"}, "02": {"prompt": "a fox"}}), (1, 2)),
    "coco.json": (
        json.dumps({"info": {}, "images": [{"id": 7}], "annos": [{"caption": p} for p in ("a red cube", "a fox")]}),
        (1, 2),
    ),
    "rows.jsonl": ('{"tag": "x", "prompt": "a red cube"}\n\n{"prompt": "a fox", "seed": 3}\n', (1, 3)),
    "strings.jsonl": ('"a red cube"\n"a fox"\n', (1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_the_prompts_of_a_table_are_read_with_their_numbers(name, tmp_path):
    text, lines = READ[name]
    (tmp_path / name).write_bytes(text.encode())
    prompts = read_prompts(str(tmp_path / name))
    assert (prompts.texts, prompts.lines, prompts.warnings) == (("a red cube", "a fox"), lines, ())


def test_a_quoted_cell_holds_separators_quotes_and_lines(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('Prompt,Note\n"a cube, red\nand shiny",x\n"it says ""hi""",y\na fox,"z\nz"\na dog,\n')
    prompts = read_prompts(str(file))
    assert prompts.texts == ("a cube, red\nand shiny", 'it says "hi"', "a fox", "a dog")
    assert prompts.lines == (2, 4, 5, 7)


def test_quotes_that_are_no_pairs_are_text_in_a_tsv(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_text('Prompt\tNote\n"STOP" on a sign\tx\n"never closed\ty\nthe end"\tz\n')
    assert read_prompts(str(file)).texts == ('"STOP" on a sign', '"never closed', 'the end"')
    file.write_text('Prompt\tNote\n"a\ttab"\t"x\ny"\n')
    assert read_prompts(str(file)).texts == ("a\ttab",)


def test_a_column_called_prompt_is_taken_and_the_other_is_named(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("caption,prompt\nno,yes\n")
    prompts = read_prompts(str(file))
    assert prompts.texts == ("yes",)
    assert prompts.warnings == (f"{file}: 'prompt' holds the prompts; 'caption' is not read.",)


def test_repeated_entries_and_blank_cells(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(["a", "", "b", "a"]))
    prompts = read_prompts(str(file))
    assert (prompts.texts, prompts.lines) == (("a", "b"), (1, 3))
    assert prompts.warnings == (f"{file}: entry 4 repeats entry 1; captured once.",)


REFUSED = {
    "ragged.csv": ("Prompt,Category\na red cube, shiny,Colors\n", "line 2: has 3 cells, but the header has 2"),
    "headless.csv": ("a red cube\na fox\n", "none has the prompts. Name the column prompt"),
    "header.csv": ("Prompt,Category\n", "holds no prompts"),
    "two.csv": ("text,caption\na,b\n", "'text' and 'caption' may hold the prompts. Rename the right one to prompt"),
    "same.csv": ("Prompt,prompt\na,b\n", "'Prompt' and 'prompt' may hold"),
    "open.csv": ('Prompt,C\nok,x\n"never closed,x\nmore,y\n', "line 3: unexpected end of data"),
    "lines.json": ('{"prompt": "a"}\n{"prompt": "b"}\n', "line 2: not JSON (Extra data). Name it .jsonl"),
    "broken.json": ('["a",\n "b"', "line 2: not JSON"),
    "deep.json": ("[" * 100_000, "nested too deep"),
    "number.json": ("3", "neither a list nor an object"),
    "one.json": ('{"prompt": "a"}', "'prompt' is no list"),
    "named.json": ('{"a": "x", "b": "y"}', "its columns are 'a', 'b', and none has the prompts"),
    "null.json": ('[{"prompt": null}]', "entry 1: the prompt is null"),
    "missing.json": ('[{"prompt": "a"}, {"promt": "b"}]', "entry 2: has no 'prompt'"),
    "surrogate.json": (r'["\ud800"]', "entry 1: half a character U+D800"),
    "control.json": (r'["\u0007"]', "entry 1: control character U+0007"),
    "latin.json": (b'["a",\n "caf\xe9"]', "line 2: not UTF-8 (byte 0xe9)"),
    "broken.jsonl": ('{"prompt": "a"}\na fox\n', "line 2: not JSON"),
    "wide.csv": ("Prompt\na\n".encode("utf-16"), "looks like UTF-16"),
    "table.parquet": (b"PAR1", "Save it as .csv, .tsv, .json or .jsonl"),
    "list.yaml": ("- a fox\n", "one prompt in each line"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_table_of_prompts_is_refused_with_what_to_do(name, tmp_path):
    data, words = REFUSED[name]
    file = tmp_path / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    refused(lambda: read_prompts(str(file)), 3, str(file), words)


def test_a_txt_file_is_lines_whatever_is_in_them(tmp_path):
    file = Path(tmp_path / "a.txt")
    file.write_text('Prompt\tCategory\n{"prompt": "a"}\n')
    assert read_prompts(str(file)).texts == ("Prompt\tCategory", '{"prompt": "a"}')
