"""Reads the prompts in a table: a column of a .csv or .tsv file, or a key of the entries of a .json or .jsonl file.

The column or key is found by its name, such as prompt, prompt_en or caption, in small or large letters.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.capture.errors import FileError

NAMES = ("prompt", "prompts")  # a column of this name holds the prompts whatever the other columns are
# other names of columns with prompts, in the prompt sets that people use: VBench, COCO, PickScore, DiffusionDB
OTHER_NAMES = (
    "prompt_en", "prompt_text", "text_prompt", "input_prompt", "caption", "captions", "text", "texts", "description",
    "sentence", "query", "instruction",
)  # fmt: skip
LINES = "one prompt a line in a .txt file"
# files that are neither lines of prompts nor one of the tables read here
CONVERTED = frozenset({
    ".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".yaml", ".yml", ".xml", ".html", ".toml", ".gz", ".zip",
    ".bz2", ".xz", ".zst", ".tar", ".npy", ".pkl", ".safetensors", ".docx", ".pdf",
})  # fmt: skip

Numbered = Iterator[tuple[int, str]]  # the number of a line or an entry, from 1, and the text of its prompt


def refuse_unread(path: Path) -> None:
    """Raises FileError for a kind of file that cannot be read, with the way to convert it."""
    if path.suffix.lower() in CONVERTED:
        fact = f"{path.suffix.lower()} files are not read"
        raise FileError(f"{path}: {fact}. Save it as .csv, .tsv, .json or .jsonl, or as {LINES}.")


def delimited(path: Path, lines: Sequence[tuple[int, str]], notes: list[str]) -> Numbered:
    """Yields the prompts of a .csv or .tsv file with their line numbers; `notes` takes a line on columns passed over.

    Cells in quotes may hold separators and line ends. A .tsv file whose quotes are no pairs has no quoted cells. Raises
    FileError for a table without a column of prompts, and for rows that are not as long as the header.
    """
    tabs = path.suffix.lower() == ".tsv"
    header = next((text for _, text in lines if text.strip()), "")
    separator = "\t" if tabs else max(",;\t", key=header.count)
    rows = _tabbed(path, lines) if tabs else list(_rows(path, lines, separator, csv.QUOTE_MINIMAL))
    if not rows:
        return
    names = rows[0][1]
    column = names.index(_chosen(path, names, notes))
    for number, cells in rows[1:]:
        if len(cells) != len(names):
            fact = f"{len(cells)} cells, where the header has {len(names)}"
            raise FileError(f"{path}: line {number}: {fact}. Correct it, or put quotes around the prompt.")
        yield number, cells[column]


def _tabbed(path: Path, lines: Sequence[tuple[int, str]]) -> list[tuple[int, list[str]]]:
    """The rows of a .tsv file, whose quotes stand around cells or are part of the text."""
    plain = list(_rows(path, lines, "\t", csv.QUOTE_NONE))
    try:
        quoted = list(_rows(path, lines, "\t", csv.QUOTE_MINIMAL))
    except FileError:
        return plain
    even = len({len(cells) for _, cells in plain}) == 1 and len(plain[0][1]) > 1
    return plain if even and len(plain) != len(quoted) else quoted  # a cell over several lines leaves them uneven


def _rows(
    path: Path, lines: Sequence[tuple[int, str]], separator: str, quoting: Any
) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows that are not empty, each with the number of its first line."""
    reader = csv.reader((text + "\n" for _, text in lines), delimiter=separator, quoting=quoting, strict=True)
    first = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise FileError(f"{path}: line {first}: {error}. Double the quotes inside a quoted cell.") from error


def json_lines(path: Path, lines: Iterable[tuple[int, str]], notes: list[str]) -> Numbered:
    """Yields the prompts of a file whose lines are JSON strings or objects. Raises FileError for any other line."""
    entries = []
    for number, text in lines:
        if text.strip():
            try:
                entries.append((number, json.loads(text)))
            except (ValueError, RecursionError) as error:
                remedy = f"Give an object or a string in each line, or {LINES}"
                raise FileError(f"{path}: line {number}: not JSON. {remedy}.") from error
    return _of_entries(path, entries, "line", notes)


def json_document(path: Path, text: str, notes: list[str]) -> Numbered:
    """Yields the prompts of a JSON file with the numbers of their entries, from 1.

    Prompts are a list of strings or of objects, an object of objects, of lists of the same length (columns), or with
    one list of objects that have prompts. Raises FileError for anything else.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "Name it .jsonl" if error.msg == "Extra data" else "Correct it"
        raise FileError(f"{path}: line {error.lineno}: not JSON ({error.msg}). {remedy}.") from error
    except RecursionError as error:
        raise FileError(f"{path}: nested too deep. Give a list of prompts.") from error
    if isinstance(found, dict):
        found = _list_in(path, found, notes)
    if not isinstance(found, list):
        raise FileError(f"{path}: neither a list nor an object. Give a list of prompts, or {LINES}.")
    return _of_entries(path, list(enumerate(found, 1)), "entry", notes)


def _list_in(path: Path, found: Mapping[str, Any], notes: list[str]) -> list[Any]:
    """The list of prompts, or of entries with prompts, in an object."""
    values = list(found.values())
    if values and all(isinstance(value, dict) for value in values):
        return values
    tables = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    holding = [table for table in tables if any(_kind(name) for name in table[0])]
    columns = [name for name, value in found.items() if isinstance(value, list) and _kind(name)]
    if len(holding) == 1 and not columns:
        return holding[0]
    name = _chosen(path, list(found), notes)
    if not isinstance(found[name], list):
        raise FileError(f"{path}: {name!r} is no list. Give a list of prompts, or {LINES}.")
    return found[name]


def _of_entries(path: Path, entries: Sequence[tuple[int, Any]], word: str, notes: list[str]) -> Numbered:
    names = list(dict.fromkeys(name for _, entry in entries if isinstance(entry, dict) for name in entry))
    key = _chosen(path, names, notes) if names else ""
    for number, entry in entries:
        where = f"{path}: {word} {number}"
        if isinstance(entry, dict) and key not in entry:
            raise FileError(f"{where}: has no {key!r}. Add it, or remove the entry.")
        text = entry[key] if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            kind = {dict: "an object", list: "a list", type(None): "null"}.get(type(text), repr(text))
            raise FileError(f"{where}: the prompt is {kind}, not a string. Correct it.")
        yield number, text


def _kind(name: str) -> int:
    """Ranks the name of a column or key: 2 for prompts, 1 for prompts where no column is of rank 2, 0 for others."""
    word = name.strip().casefold().replace(" ", "_").replace("-", "_")
    return 2 if word in NAMES else int(word in OTHER_NAMES)


def _chosen(path: Path, names: Sequence[str], notes: list[str]) -> str:
    """The name of the column with the prompts. Raises FileError where there is none, or more than one."""
    known = ", ".join(repr(name.strip()[:40]) for name in names[:8]) or "nothing"
    for kind in (2, 1):
        chosen = [name for name in names if _kind(name) == kind]
        if len(chosen) > 1:
            both = " and ".join(repr(name) for name in chosen)
            raise FileError(f"{path}: {both} may hold the prompts. Name one of them prompt.")
        if chosen:
            if others := [name for name in names if _kind(name) and name != chosen[0]]:
                notes.append(f"{path}: {chosen[0]!r} holds the prompts; {', '.join(map(repr, others))} is not read.")
            return chosen[0]
    raise FileError(f"{path}: no column of prompts among {known}. Name it prompt in the file, or write {LINES}.")
