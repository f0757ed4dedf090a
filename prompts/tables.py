"""Reads prompts from tables: from a column of a .csv or .tsv file, or a key in the entries of a .json or .jsonl file.

The column or key is known by its name, such as prompt, prompt_en or caption, whatever its case.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.capture.errors import FileError

NAMES = ("prompt", "prompts")  # a column of this name holds the prompts, whichever other columns there are
# other column names of prompts in public prompt sets: VBench, COCO, PickScore, DiffusionDB
OTHER_NAMES = (
    "prompt_en", "prompt_text", "text_prompt", "input_prompt", "caption", "captions", "text", "texts", "description",
    "sentence", "query", "instruction",
)  # fmt: skip
LINES = "one prompt in each line of a .txt file"
# endings that are refused: neither text nor a table that this file reads
CONVERTED = frozenset({
    ".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".yaml", ".yml", ".xml", ".html", ".toml", ".gz", ".zip",
    ".bz2", ".xz", ".zst", ".tar", ".npy", ".pkl", ".safetensors", ".docx", ".pdf",
})  # fmt: skip

Numbered = Iterator[tuple[int, str]]  # the number of a line or an entry, from 1, and the text of its prompt


def refuse_unread(path: Path) -> None:
    """Raises FileError if the ending of `path` is that of a file that is neither text nor a table that can be read,
    such as .xlsx or .gz. The message says how to convert the file."""
    if path.suffix.lower() in CONVERTED:
        fact = f"{path.suffix.lower()} files are not read"
        raise FileError(f"{path}: {fact}. Save it as .csv, .tsv, .json or .jsonl, or as {LINES}.")


def delimited(path: Path, lines: Sequence[tuple[int, str]], notes: list[str]) -> Numbered:
    """Yields the line number and prompt of each row of a .csv or .tsv file. `lines` are its lines with their numbers.

    Quoted cells may contain separators and line ends. In a .tsv file with unpaired quotes, quotes are part of the text.
    Raises FileError for a table without a column of prompts, and for a row that is longer or shorter than the header.
    Appends a note on ignored columns to `notes`.
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
            fact = f"has {len(cells)} cells, but the header has {len(names)}"
            raise FileError(f"{path}: line {number}: {fact}. Correct it, or put quotes around the prompt.")
        yield number, cells[column]


def _tabbed(path: Path, lines: Sequence[tuple[int, str]]) -> list[tuple[int, list[str]]]:
    """Returns the rows of a .tsv file, each as the number of its first line and its cells. `lines` are the numbered
    lines of the file.

    Quotes are part of the text if the file would not be valid CSV with quotes that enclose cells, or if such quotes
    would join lines although every line has the same number of cells. Otherwise quotes enclose cells.
    """
    plain = list(_rows(path, lines, "\t", csv.QUOTE_NONE))
    try:
        quoted = list(_rows(path, lines, "\t", csv.QUOTE_MINIMAL))
    except FileError:
        return plain
    even = len({len(cells) for _, cells in plain}) == 1 and len(plain[0][1]) > 1
    return (
        plain if even and len(plain) != len(quoted) else quoted
    )  # read without quoting, a cell over several lines gives rows of different lengths


def _rows(
    path: Path, lines: Sequence[tuple[int, str]], separator: str, quoting: Any
) -> Iterator[tuple[int, list[str]]]:
    """Yields, for each row that is not empty, the number of its first line and its cells.

    `lines` are the numbered lines of the file, `separator` is the character between cells, and `quoting` says whether
    quotes enclose cells, as in the csv module. Raises FileError for a row that is not valid CSV.
    """
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
    """Yields the number and the prompt of each of `lines` that is not blank. A line holds a JSON string, or a JSON
    object with the prompt under a key such as "prompt". All objects have this same key. Raises FileError for any other
    line.

    Appends a note on ignored keys to `notes`.
    """
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
    """Yields the number, from 1, and the prompt of each entry of `text`, the content of the JSON file `path`.

    Entries are strings, or objects with the prompt under a key such as "prompt". The file holds a list of entries, such
    as ["a", "b"]; an object whose values are entries, {"1": {"prompt": "a"}}; an object of lists, {"prompt": ["a",
    "b"]}; or an object in which one list holds entries, {"data": [{"prompt": "a"}]}. Raises FileError for anything
    else. Appends a note on ignored keys to `notes`.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "Name it .jsonl" if error.msg == "Extra data" else "Correct it"
        raise FileError(f"{path}: line {error.lineno}: not JSON ({error.msg}). {remedy}.") from error
    except RecursionError as error:
        raise FileError(f"{path}: nested too deep. Give a list of prompts.") from error
    if isinstance(document, dict):
        document = _list_in(path, document, notes)
    if not isinstance(document, list):
        raise FileError(f"{path}: neither a list nor an object. Give a list of prompts, or {LINES}.")
    return _of_entries(path, list(enumerate(document, 1)), "entry", notes)


def _list_in(path: Path, document: Mapping[str, Any], notes: list[str]) -> list[Any]:
    """Returns the list of prompts, or of entries with prompts, in the JSON object `document`.

    Raises FileError if the object holds no such list, or several that may be meant. Appends a note on ignored keys to
    `notes`.
    """
    values = list(document.values())
    if values and all(isinstance(value, dict) for value in values):
        return values
    tables = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    holding = [table for table in tables if any(_kind(name) for name in table[0])]
    columns = [name for name, value in document.items() if isinstance(value, list) and _kind(name)]
    if len(holding) == 1 and not columns:
        return holding[0]
    name = _chosen(path, list(document), notes)
    if not isinstance(document[name], list):
        raise FileError(f"{path}: {name!r} is no list. Give a list of prompts, or {LINES}.")
    return document[name]


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
    """Returns the kind of a column by its name: 2 for prompt or prompts, 1 for another name that may mean prompts, such
    as caption, and 0 for all others.

    A column of kind 1 is read only if there is no column of kind 2; a column of kind 0 is never read.
    """
    word = name.strip().casefold().replace(" ", "_").replace("-", "_")
    return 2 if word in NAMES else int(word in OTHER_NAMES)


def _chosen(path: Path, names: Sequence[str], notes: list[str]) -> str:
    """Returns which of the column names `names` holds the prompts. Raises FileError if no name or more than one name
    may be that of the prompts, unless exactly one column is named prompt or prompts.

    Appends to `notes` which other columns may hold prompts and are not read.
    """
    known = ", ".join(repr(name.strip()[:40]) for name in names[:8]) or "nothing"
    for kind in (2, 1):
        chosen = [name for name in names if _kind(name) == kind]
        if len(chosen) > 1:
            both = " and ".join(repr(name) for name in chosen)
            raise FileError(f"{path}: {both} may hold the prompts. Rename the right one to prompt.")
        if chosen:
            if others := [name for name in names if _kind(name) and name != chosen[0]]:
                notes.append(f"{path}: {chosen[0]!r} holds the prompts; {', '.join(map(repr, others))} is not read.")
            return chosen[0]
    remedy = f"Name the column prompt, or write {LINES}"
    raise FileError(f"{path}: its columns are {known}, and none has the prompts. {remedy}.")
