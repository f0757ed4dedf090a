"""Checks that nested arguments come back with their values and types."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.capture.store.tree import MAX_DEPTH, decode
from octavo.capture.store.tree_encoder import MAX_VALUES, encode

from ...helpers.examples import examples
from ...helpers.refusals import refused

DTYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]
SIZES = st.lists(st.integers(0, 2**40), max_size=4).map(torch.Size)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters()),  # includes lone surrogates
    st.binary(max_size=20),
    st.complex_numbers(),
    st.sampled_from(DTYPES),
    SIZES,
    st.sampled_from([torch.device("cpu"), torch.device("cuda:1")]),
    st.floats(width=32).map(np.float32),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
)
KEYS = st.one_of(st.text(max_size=5), st.integers(), st.booleans(), st.tuples(st.integers(), st.text(max_size=2)))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


def spelled(value: Any) -> Any:
    """Returns a form of the value that is equal only for the same types, order and bits: -0.0 differs from 0.0, nan
    equals nan."""
    if isinstance(value, dict):
        return ("dict", [(spelled(key), spelled(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return (type(value).__name__, [spelled(item) for item in value])
    return (type(value).__name__, repr(value))


def through_json(value: Any) -> Any:
    tensors: list[torch.Tensor] = []

    def put(tensor: torch.Tensor, path: str) -> int:
        tensors.append(tensor)
        return len(tensors) - 1

    return decode(json.loads(json.dumps(encode(value, put), allow_nan=False)), tensors.__getitem__)


@examples(1000)
@given(VALUES)
def test_every_value_comes_back_with_its_types_and_bits(value: Any) -> None:
    assert spelled(through_json(value)) == spelled(value)


EDGES: list[Any] = [
    math.inf,
    -math.inf,
    math.nan,
    -0.0,
    1e-320,
    0.1,
    True,
    1,
    1.0,
    "",
    "\ud83d\ude00",
    (),
    [],
    {},
    {1: True},
]
EDGES += [2**63, 2**64, -(2**63) - 1, 10**5000, torch.Size([]), {"a": {"b": (None, [torch.Size([2, 3])])}}]


@pytest.mark.parametrize(
    "value",
    EDGES,
    ids=lambda value: f"{type(value).__name__}-{str(value)[:12]!a}" if value != 10**5000 else "huge",
)
def test_edge_values_come_back(value: Any) -> None:
    with_types = spelled(value) if not (isinstance(value, int) and value > 2**70) else value
    back = through_json(value)
    assert (spelled(back) if with_types is not value else back) == with_types


def test_tensors_are_put_and_got_under_their_paths() -> None:
    paths = []
    tensor = torch.ones(2)
    tree = encode({"a": [tensor, {"b": (tensor,)}]}, lambda tensor, path: paths.append(path), "added")
    assert paths == ["added.a[0]", "added.a[1].b[0]"]
    assert isinstance(decode(tree, lambda _: tensor)["a"][1]["b"][0], torch.Tensor)


class Cache:
    pass


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        (Cache(), f"'cache': cannot store a value of type {__name__}.Cache"),
        ({"inner": [1, Cache()]}, f"'cache.inner[1]': cannot store a value of type {__name__}.Cache"),
        ({1, 2}, "'cache': cannot store a value of type set"),
        (torch.nn.Linear(1, 1), "'cache': cannot store a value of type torch.nn.modules.linear.Linear"),
    ],
)
def test_unknown_types_name_the_input_and_the_remedy(value: Any, fact: str) -> None:
    message = refused(lambda: encode(value, lambda *_: 0, "cache", "transformer input"), 3)
    assert message == f"transformer input {fact}. Pass tensors, numbers or text instead, or leave it out."


def test_depth_is_bounded() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert through_json(value) == value
    refused(lambda: through_json([value]), 3, f"nested deeper than {MAX_DEPTH} levels")
    endless: list[Any] = []
    endless.append(endless)
    refused(lambda: through_json(endless), 3, "nested deeper")


def test_a_list_of_shared_lists_is_not_unfolded() -> None:
    value: Any = [0] * 10
    for _ in range(12):
        value = [value] * 10
    refused(lambda: through_json(value), 3, f"holds more than {MAX_VALUES} values")


@pytest.mark.parametrize(
    "tree", [{}, {"a": 1, "b": 2}, {"evil": 1}, {"dtype": "nn"}, {"float": "1"}, {"numpy": ["O", "00"]}, {"Size": "x"}]
)
def test_foreign_trees_raise_what_readers_expect(tree: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        decode(tree, lambda _: None)
