"""Recipes are YAML 1.2, and what is written as YAML is read back."""

import string
from itertools import pairwise
from typing import Any

import pytest
import yaml
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


MERGES = [
    "a: &a {x: 1}\nb: &b {x: 2, y: 3}\nc: {<<: [*a, *b], z: 1}",
    "a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {y: 3, <<: *b}",
    "a: &a {x: {z: 1}}\nb: {<<: [*a], x: {w: 2}}",
    "a: &a {x: 1}\nb:\n  <<: *a\n  x: 2\n",
]


@pytest.mark.parametrize("text", MERGES)
def test_merge_keys_are_merged_as_pyyaml_does(text: str) -> None:
    assert parse(text) == yaml.safe_load(text)


def test_a_key_that_is_written_twice_beside_a_merge_is_refused() -> None:
    with pytest.raises(ValueError, match=r"line 2, column 19: key 'x' is there twice"):
        parse("a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}")


def laughs(entry: str, joined: str) -> str:
    """Return aliases of aliases: ten lines that stand for nine to the ninth values."""
    lines = [f"a: &a {entry}"]
    for last, this in pairwise("abcdefghij"):
        lines.append(f"{this}: &{this} " + joined % ", ".join([f"*{last}"] * 9))
    return "\n".join(lines)


TOO_LARGE = {
    "aliases of aliases": (laughs("[lol, lol]", "[%s]"), "values with its aliases; at most 100,000 are taken"),
    "merges of merges": (laughs("{x: 1}", "{<<: [%s]}"), "values with its aliases; at most 100,000 are taken"),
    "a value in itself": ("a: &a [*a]", "a value contains itself"),
    "a merge of itself": ("a: &a {<<: *a}", "a value contains itself"),
    "depth": ("a: " + "[" * 80 + "]" * 80, "nested more than 60 deep"),
    "length": ("#" * 2**17 + "\na: 1", "131,077 characters; at most 131,072 are taken"),
    "digits": ("a: " + "9" * 5000, "a number of 5000 characters"),
    "hexadecimal digits": ("a: 0x" + "f" * 5000, "a number of 5002 characters"),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_text_that_stands_for_too_much_is_refused_before_it_is_made(name: str) -> None:
    text, message = TOO_LARGE[name]
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("tag", ["!!binary", "!!set", "!!omap", "!!python/object:os.system", "!own"])
def test_a_tag_of_more_than_plain_values_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match=f"line 1, column 4: the tag {tag} is not taken; write plain values"):
        parse(f"a: {tag} {{x, y}}")
