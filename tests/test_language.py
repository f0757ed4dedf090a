"""Checks that docstrings and messages keep the rules for plain English in CONTRIBUTING.md."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("octavo", "capture", "prompts", "pipelines", "calibrate")
FOLDERS = (*PRODUCT, "bench", "tests")
FILES = [file.relative_to(ROOT) for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
# A sentence that opens with one of these leaves open what it is about.
OPENINGS = re.compile(r"(of|that|those|these|this|what|its|it|the same|such)\b", re.IGNORECASE)
# The field has another word: record, observe, show, report, part, range, rank, memory, flag.
WORDS = re.compile(
    r"\b((un|over)?heard|hears?|tells?|told|(a|the|each|its|this|one|own) turns?|portions?|rooms?|spreads?(?!:)"
    r"|(?<!order )(?<!question )mark(s|ed)?)\b",
    re.IGNORECASE,
)
VERBS = frozenset(
    """
    accepts adds advances allows announces appends applies are asks attaches augments becomes begins belongs binds
    brings builds calibrates calls can captures carries casts changes checks chooses cleans clears clips closes
    collects comes compares compiles computes connects contains converts copies costs counts creates cuts damages
    declares decodes delegates deletes depends describes differs discards disconnects distils divides do does draws
    drops edits embeds encodes ends enters estimates evaluates exports fails fills finds fits flips folds follows
    formats forwards frees gathers gives goes groups guesses has have holds ignores imports improves infers installs
    is joins keeps knows lacks learns leaves lets lists loads locks logs looks lowers makes maps marks matches may
    means measures merges moves multiplies must names needs normalizes observes opens orders packs pads parks parses
    passes patches picks places plans predicts prefers prepares presses prevents prints produces puts quantizes
    queries raises ranks reads rebuilds receives records redirects refuses registers releases removes renames
    replaces replays reports represents requires reshapes restores returns rewrites rotates rounds runs samples
    saves says scales searches selects serializes serves sets shards shares shows silences solves sorts splits
    stands starts stops stores subtracts sums supports swaps takes tests ticks traces trains transforms translates
    tries undoes unpacks updates uses waits warns was watches were wraps writes yields
    """.split()  # noqa: SIM905, a list of this length would take a line for each
)


@cache
def tree(file: Path) -> ast.Module:
    """Returns the parsed file."""
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def docstrings(file: Path) -> Iterator[tuple[str, ast.AST, str]]:
    """Yields the place, the node and the docstring of each module, class and function that has one."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield f"{file}:{getattr(node, 'lineno', 1)} {getattr(node, 'name', '')}", node, text


def is_property(node: ast.AST) -> bool:
    """Returns whether a function is read like an attribute, whose docstring may just name the value."""
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(decorator).endswith("property") for decorator in decorators)


def has_verb(text: str) -> bool:
    """Returns whether a docstring has a verb: in the third person, or an imperative at its beginning, as in help."""
    words = re.findall(r"[a-z]+", text.lower())
    return not VERBS.isdisjoint([*words, f"{words[0]}s", f"{words[0]}es"])


def messages(file: Path) -> Iterator[tuple[str, str]]:
    """Yields the place and the text of each string of several words that is no docstring: messages, help and tables."""
    skipped = {id(node.body[0].value) for _, node, _ in docstrings(file)}  # type: ignore[attr-defined]
    for node in ast.walk(tree(file)):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if " " in text and id(node) not in skipped:
            yield f"{file}:{node.lineno}", text


@pytest.mark.parametrize("folder", [*PRODUCT, "bench", "tests"])
def test_docstrings_open_with_what_they_are_about(folder):
    files = [file for file in FILES if file.parts[0] == folder]
    wrong = [place for file in files for place, _, text in docstrings(file) if OPENINGS.match(text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", [*PRODUCT, "bench"])
def test_docstrings_and_messages_use_the_words_of_the_field(folder):
    wrong = []
    for file in FILES:
        if file.parts[0] == folder:
            texts = [(place, text) for place, _, text in docstrings(file)] + list(messages(file))
            wrong += [f"{place}: {match[0]}" for place, text in texts if (match := WORDS.search(text))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", PRODUCT)
def test_docstrings_of_public_functions_and_classes_have_a_verb(folder):
    wrong = []
    for file in FILES:
        if file.parts[0] != folder:
            continue
        for place, node, text in docstrings(file):
            public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            if public and not is_property(node) and not has_verb(text):
                wrong.append(f"{place}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
