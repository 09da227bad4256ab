"""Recipes are YAML 1.2, and what is written as YAML is read back."""

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.config.yaml_loader import dump, parse

_plain = st.text(string.printable, max_size=12) | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)
_values = st.recursive(
    _plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5E3", 5e3), ("-.5", -0.5), ("010", 10), ("0x1F", 31), ("1:30", "1:30"), ("'1e-4'", "1e-4")],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


def test_a_merged_mapping_gives_the_keys_that_are_not_written() -> None:
    found = parse("a: &grid {num_bits: 4, group_size: 64}\nb: {<<: *grid, num_bits: 3}\nc: *grid")
    assert found["b"] == {"num_bits": 3, "group_size": 64}
    assert found["c"] == found["a"]


WORDS = ["on", "1e5", "0o17", "2024-01-01", "1:30", "<<", "=", "null", "~", " a", "a: b", "#", "a\x85b", "\u2028"]


@pytest.mark.parametrize("word", WORDS)
def test_words_that_look_like_something_else_stay_words(word: str) -> None:
    assert parse(dump({"a": word})) == {"a": word}


@given(_values)
def test_what_is_dumped_is_read_back(value: Any) -> None:
    found = parse(dump(value))
    assert found == value
    assert type(found) is type(value)


def test_keys_are_written_in_their_order() -> None:
    assert dump({"b": 1, "a": {"d": 2, "c": 3}}) == "b: 1\na:\n  d: 2\n  c: 3\n"
