"""The code blocks of the documentation, and how to run them.

A comment on the line before a block of shell commands (``console``) or Python says what tests do with it:

    <!-- run -->            every test run runs it
    <!-- run: slow -->      tests marked slow run it
    <!-- not run: REASON -->

The blocks of a page run in their order and in one folder.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CODE = ("console", "python")  # languages of the blocks that are run
OWN = "docs/python.md"  # the page whose blocks tests/docs/test_python.py runs in one process
_FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


class Snippet(NamedTuple):
    """A code block of a page."""

    page: str
    line: int
    language: str
    mark: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Return the pages that readers meet."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets_of(text: str, page: str) -> Iterator[Snippet]:
    """Yield the code blocks of a page."""
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("code"))
        yield Snippet(page, line, found["language"], found["mark"] or "", found["code"])


def snippets() -> list[Snippet]:
    """Return the code blocks of all pages."""
    return [
        snippet
        for path in pages()
        for snippet in snippets_of(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]


def commands(code: str) -> Iterator[str]:
    """Yield the commands of a block of shell, each from its prompt on; a backslash at an end goes on."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            yield line[2:]


def calls(command: str) -> Iterator[list[str]]:
    """Yield the words of each call of qtool in a command, without what a shell does with its output."""
    call: list[str] | None = None
    for word in [*_words(command), ";"]:
        if set(word) <= set("();<>|&"):
            if call is not None:
                yield call
            call = None
        elif call is not None:
            call.append(word)
        elif word == "qtool":
            call = []


def _words(command: str) -> list[str]:
    """Return the words of a command, operators of the shell as words of their own, without a comment."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    return list(lexer)


def run(snippet: Snippet, folder: Path) -> None:
    """Run a block in ``folder``; ``qtool`` is this source tree.

    Raises:
        AssertionError: a command failed; the message has its output.
    """
    tools = folder / ".tools"
    tools.mkdir(exist_ok=True)
    tool = tools / "qtool"
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qtool "$@"\n', encoding="utf-8")
    tool.chmod(0o755)
    if snippet.language == "python":
        command = [sys.executable, "-c", snippet.code]
    else:
        command = ["bash", "-e", "-u", "-o", "pipefail", "-c", "\n".join(commands(snippet.code))]
    search = os.pathsep.join([str(tools), os.environ["PATH"]])
    environment = os.environ | {"PATH": search, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{snippet}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
