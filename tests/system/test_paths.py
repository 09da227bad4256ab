"""Paths mean one thing everywhere: home folders and variables are expanded, and what is no path is an input error."""

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qtool.system import paths
from qtool.system.errors import InputError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WORD", "word")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a/b", "a/b"),
        ("$WORD/x", "word/x"),
        ("x${WORD}y", "xwordy"),
        ("a$$b", "a$b"),
        ("$$WORD", "$WORD"),
        ("builtin:wiki-llama-3m", "builtin:wiki-llama-3m"),
        ("org/name", "org/name"),
        ("a~b", "a~b"),
    ],
)
def test_variables_are_expanded_and_names_stay(text: str, found: str) -> None:
    assert paths.expand(text, "key") == Path(found)


def test_home_folders_are_expanded_also_from_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORD", "~")
    assert paths.expand("~/x", "key") == paths.expand("$WORD/x", "key") == tmp_path / "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty text is no path"),
        ("~nosuchuser/x", "has no user nosuchuser"),
        ("$UNSET/x", "the environment variable UNSET is not set; for a dollar sign write"),
        ("${UNSET}", "the environment variable UNSET is not set"),
        ("${}", "is not set"),
        ("a\0b", "a NUL character"),
        ("\ud800", "half of a surrogate pair"),
        ("x" * 300, "File name too long"),
        ("loop/x", "symbolic links"),
    ],
)
def test_what_is_no_path_is_an_input_error_that_names_the_key(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"^output\.path: ") as caught:
        paths.expand(text, "output.path")
    assert message in str(caught.value)


NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(NAMES.filter(lambda name: name.strip(".")))
@example("~x")
def test_the_text_of_a_path_means_that_path(name: str) -> None:
    path = Path(name)
    assert paths.expand(paths.path_text(path), "key") == path
    assert os.fspath(paths.expand(paths.path_text(path / name), "key")) == f"{path}/{path}"
