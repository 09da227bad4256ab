"""Text of others is shown without control characters and without secrets, and otherwise as it is."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.system.printable import one_line, printable, redacted, shown, without_secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b]0;owned\x07\x1b[31mred", r"\x1b]0;owned\x07\x1b[31mred"),
        ("\x9b31m", r"\x9b31m"),  # C1: some terminals take it for ESC [
        ("a\rb", r"a\x0db"),
        ("a\r\nb", "a\nb"),
        ("\u202eexe.txt\u202c \u2066x\u2069", r"\u202eexe.txt\u202c \u2066x\u2069"),
        ("a\u2028b\x85c\x7f", r"a\u2028b\x85c\x7f"),
        ("\udc80 \ud800", r"\udc80 \ud800"),
        ("Füße ± 你好 👩‍👩‍👧 עברית\n\tx", "Füße ± 你好 👩‍👩‍👧 עברית\n\tx"),
    ],
)
def test_control_characters_are_written_out_and_other_text_stays(text: str, expected: str) -> None:
    assert printable(text) == expected


@given(st.text(st.characters()))
def test_what_is_shown_can_be_encoded_and_is_shown_the_same_again(text: str) -> None:
    found = printable(text)
    found.encode("utf-8")
    assert printable(found) == found
    assert "\n" not in one_line(text)


def test_a_name_cannot_break_a_line_and_our_own_lists_stay_readable() -> None:
    assert one_line("a\nb") == r"a\nb"
    assert one_line("2 fault(s):\n  seed: wrong\n  model: wrong") == "2 fault(s): seed: wrong model: wrong"


TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://alice:s3cretpw@host:80/x", "http://***@host:80/x"),
        ("for url 'https://alice:p@ss@host/x?a=1'", "for url 'https://***@host/x?a=1'"),
        ("https://alice:pa/ss@host/x@main", "https://***@host/x@main"),
        ("https://token@host and ray://u:p@h", "https://***@host and ray://***@h"),
        (f"Invalid token {TOKEN}.", "Invalid token ***."),
        ("https://s3/x?X-Amz-Signature=ab12&X-Amz-Date=3&X-Amz-Security-Token=c", None),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic YWxpY2U6czNjcmV0'}", "{'authorization': 'Basic ***'}"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
    ],
)
def test_secrets_are_taken_out(text: str, expected: str | None) -> None:
    wanted = expected or "https://s3/x?X-Amz-Signature=***&X-Amz-Date=3&X-Amz-Security-Token=***"
    assert redacted(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co:443/a/b@main",
        "out/hf_transformers, hf_hub_download",
        "basic arithmetic; bearer bonds",
        "user@example.org",
        "quant.overrides: *.mlp; seed=3",
        "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_secrets_of_the_environment_are_known_by_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_ENDPOINT", "http://alice:s3cr%20et@host")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/alice/token")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    monkeypatch.setenv("SHORT_TOKEN", "1")
    assert shown("key 0123456789abcdef, s3cr et or s3cr%20et") == "key ***, *** or ***"
    assert shown("/home/alice/token disabled 1") == "/home/alice/token disabled 1"


def test_plain_data_is_redacted_at_any_depth() -> None:
    value = {"a": [1, "x://u:p@h", {"x://u:p@h": None}], "b": 0.5, "c": ("x://u:p@h",)}
    assert without_secrets(value) == {"a": [1, "x://***@h", {"x://***@h": None}], "b": 0.5, "c": ["x://***@h"]}


def test_a_variable_that_another_thread_removes_meanwhile_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Removing(dict[str, str]):
        def __iter__(self) -> Iterator[str]:
            yield from ("GONE_TOKEN", "HERE_TOKEN")

        def items(self) -> Any:
            return ((name, self[name]) for name in self)

    monkeypatch.setattr(os, "environ", Removing(HERE_TOKEN="0123456789"))
    assert redacted("0123456789") == "***"
