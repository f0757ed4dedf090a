"""Checks that a JSON file is read as an object, or refused with one message that names the file."""

import json
import random
from functools import partial
from pathlib import Path

import pytest

from octavo.capture.json_kinds import checked, count, fields, list_of, maybe, number, object_of, one_of, text
from octavo.capture.sealed import digest_of, digest_of_file, json_object

from ..helpers.damage import json_changed
from ..helpers.refusals import error_of, refused

FILE = Path("x.json")
SOUND = {"a": {"b": [1, 2.5, None]}, "c": "text", "d": {}}


def test_any_change_is_read_as_an_object_or_refused_by_name():
    read = 0
    for _, content in json_changed(json.dumps(SOUND).encode(), random.Random(0), 8):
        fact = error_of(partial(json_object, content, FILE), 3)
        if fact is None:
            read += 1
            json.dumps(json_object(content, FILE), allow_nan=False, ensure_ascii=False).encode()
        else:
            assert fact.startswith("x.json: ")
            assert len(fact) < 200
    assert read


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "line 1"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1e999}', "1e999 is not a number"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "nested too deeply"),
        (b'{"a": ' + b"[" * 10**6, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "does not hold a JSON object"),
    ],
)
def test_json_that_other_readers_accept_is_refused(content, words):
    refused(lambda: json_object(content, FILE), 3, words)


def test_configs_of_other_libraries_may_hold_infinity():
    assert json_object(b'{"a": -Infinity}', FILE, finite=False) == {"a": -float("inf")}


KIND = fields(
    {"a": count, "b": list_of(number, 2)},
    {"c": maybe(text), "d": one_of(number, list_of(number)), "e": object_of(text)},
)


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        ([], "the content is [], not an object"),
        ({"b": [1, 2]}, "the content has no a"),
        ({"a": True, "b": [1, 2]}, "a is true, not a whole number from 0 to 2^63 - 1"),
        ({"a": -1, "b": [1, 2]}, "a is -1, not a whole number from 0 to 2^63 - 1"),
        ({"a": 2**64, "b": [1, 2]}, "a is 18446744073709551616, not a whole number from 0 to 2^63 - 1"),
        ({"a": 1, "b": [1]}, "b is [1], not a list of 2"),
        ({"a": 1, "b": [1, "x"]}, 'b[1] is "x", not a number'),
        ({"a": 1, "b": [1, 10**400]}, "not a number"),
        ({"a": 1, "b": [1, 2], "c": 1}, "c is 1, not text"),
        ({"a": 1, "b": [1, 2], "d": {}}, "d is {}, not a number"),
        ({"a": 1, "b": [1, 2], "e": {"x": 1}}, "e.x is 1, not text"),
    ],
)
def test_a_value_of_another_kind_is_named(value, fact):
    refused(partial(checked, value, KIND, FILE), 3, "x.json: damaged (", fact)


def test_values_of_the_kind_come_back():
    value = {"a": 0, "b": [1, -2.5], "c": None, "d": [0], "e": {}, "more": []}
    assert checked(value, KIND, FILE) is value


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    for size in (0, 1, 1 << 20, (1 << 20) + 1):
        (tmp_path / "x").write_bytes(content := random.Random(0).randbytes(size))
        assert digest_of_file(tmp_path / "x") == digest_of(content)
