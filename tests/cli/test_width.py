"""What the command line prints fits a terminal of 80 columns."""

import io
import sys

import pytest

from qtool.cli import main
from qtool.cli.output import fitted

WIDTH = 80


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_list_of_commands_cuts_no_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert main.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [line for line in lines[1:] if "..." in line] == []


def test_an_error_is_broken_at_blanks_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("TERM", "dumb")  # no line that says that libraries are loaded
    error = Terminal()
    monkeypatch.setattr(sys, "stderr", error)
    assert main.main(["ptq", "nosuch"]) == 2
    lines = error.getvalue().splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= WIDTH
    text = "word " * 40
    assert fitted(text, io.StringIO()) == text
