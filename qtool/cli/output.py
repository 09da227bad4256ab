"""Printing of results and of error messages.

Once printing begins the work is done, so a signal no longer interrupts: a result is printed whole.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import typer

from qtool.cli.session import Interrupted
from qtool.cli.streams import unescaped
from qtool.system import interrupts
from qtool.system.errors import InputError, RunError, listing
from qtool.system.printable import without_secrets
from qtool.system.wrapping import folded

if TYPE_CHECKING:
    from qtool.pipelines.outcome import Outcome
    from qtool.pipelines.push import Destination


class Shown(Protocol):
    """A report as a command prints it."""

    def markdown(self) -> str:
        """The report as Markdown."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The report as plain data."""


def show(
    report: Shown,
    as_json: bool,
    path: Path | None = None,
    exports: Sequence[Path] = (),
    seconds: float = 0.0,
    more: Mapping[str, Any] | None = None,
    then: Sequence[str] = (),
) -> None:
    """Print the report of a command and the folders that it wrote.

    ``more`` is said in JSON only, and the lines ``then`` on a terminal only.
    """
    if as_json:
        result = {
            "path": str(path) if path else None,
            "exports": [str(each) for each in exports],
            "seconds": round(seconds, 3),
            **(more or {}),
            "report": report.model_dump(mode="json"),
        }
        print_json(result)
        return
    show_table(report)
    folders = [str(each) for each in (path, *exports) if each is not None]
    if folders:
        print_text("\n".join(["", *folders]))
    if then and sys.stdout.isatty():
        print_text("\n".join(["", *then]))


def check_gate(outcome: "Outcome | None", to: "Destination | None" = None) -> RunError | None:
    """Return the error of a result that its quality gate does not pass, to be raised when the result is printed.

    Such a result is not pushed ``to`` the hub.
    """
    gate = outcome.report.gate if outcome is not None else None
    if outcome is None or gate is None or gate.passed:
        return None
    lines = [each.line() for each in gate.checks if not each.passed]
    if outcome.path is not None:
        lines.append(f"everything was written to {outcome.path}")
        if to is not None:
            lines.append(f"nothing was pushed; to push it all the same: {to.command(outcome.path)}")
    return RunError(listing("the result does not pass its quality gate:", lines))


def check_measured(outcome: "Outcome") -> RunError | None:
    """Return the error of an evaluation in which a task was not measured, to be raised when the result is printed."""
    missing = [row for row in outcome.report.results if row.value is None]
    lines = [f"{row.task}: {row.note.removeprefix('not measured: ')}" for row in missing]
    return RunError(listing("not every task was measured:", lines)) if lines else None


def show_table(report: Any) -> None:
    """Print a report, or a comparison, as a table for a terminal or as Markdown."""
    _begin()
    if sys.stdout.isatty() and hasattr(report, "render"):
        from rich.console import Console

        report.render(Console(file=unescaped(sys.stdout)))
    else:
        print(report.markdown())


def _begin() -> None:
    interrupts.check()  # for a signal that code of others swallowed
    interrupts.finish()


def print_text(text: str, end: str = "\n") -> None:
    """Print a result."""
    _begin()
    print(text, end=end)


def fitted(text: str, stream: TextIO) -> str:
    """Return ``text`` with its lines folded if ``stream`` is a terminal that is narrower."""
    return folded(text, get_terminal_size().columns) if stream.isatty() else text


def print_either(value: Any, text: str, as_json: bool, indent: int | None = None) -> None:
    """Print a result as JSON or as text."""
    if as_json:
        print_json(value, indent)
    else:
        print_text(text)


def print_json(value: Any, indent: int | None = None) -> None:
    """Print a result as ``json_text`` makes it."""
    _begin()
    print(json_text(value, indent))


def json_text(value: Any, indent: int | None = None) -> str:
    """Return plain data as one JSON value in ASCII, without secrets; a number that is not finite becomes null."""
    return json.dumps(_finite(without_secrets(value)), indent=indent)


def _finite(value: Any) -> Any:  # Any: plain data, as JSON has it
    match value:
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float() if not math.isfinite(value):
            return None
    return value


def explain_error(error: BaseException) -> tuple[str, int, str]:
    """The kind, exit code and message of what ended a command."""
    if usage := getattr(error, "format_message", None):  # the class is private to typer
        return "usage", 2, str(usage())
    match error:
        case InputError() | RunError() | Interrupted():
            kind = {2: "input", 1: "run", 130: "interrupted"}[error.exit_code]
            return kind, error.exit_code, str(error)
        case KeyboardInterrupt() | typer.Abort():
            return "interrupted", 130, "interrupted"
        case OSError():
            return "run", 1, f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        case MemoryError():
            return "run", 1, "out of memory"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return "run", 1, f"out of GPU memory: {error}"
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return "bug", 1, f"{text}\nThis is a bug in qtool, not in what you gave it; QTOOL_DEBUG=1 shows the traceback."
