"""``--set`` changes the key that it names, whatever the key, and nothing else."""

import string
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qtool.config.overrides import overridden
from qtool.config.yaml_loader import dump


@given(st.text(string.ascii_letters + string.digits + "._*[]?!-", min_size=1))
def test_any_pattern_can_be_set(pattern: str) -> None:
    raw, wrong = overridden({}, [f"quant.overrides.{pattern}.num_bits=8"])
    assert not wrong
    assert raw == {"quant": {"overrides": {pattern: {"num_bits": 8}}}}


_words = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8)
_plain = st.text(string.printable, max_size=12) | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)
_values = st.recursive(_plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3))


@given(path=st.lists(_words, min_size=1, max_size=4), value=_values, before=st.dictionaries(_words, st.integers()))
def test_what_is_set_is_there_and_nothing_else_changed(path: list[str], value: Any, before: dict[str, Any]) -> None:
    before.pop(path[0], None)
    raw, wrong = overridden(before, [f"{'.'.join(path)}={dump(value)}"])
    assert not wrong
    target: Any = raw
    for part in path:
        target = target[part]
    assert target == value
    assert {key: each for key, each in raw.items() if key != path[0]} == before
