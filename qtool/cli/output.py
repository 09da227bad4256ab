"""How a command's result is printed, and what is said of an error."""

import sys
from collections.abc import Mapping
from typing import Any

import typer

from qtool.cli.session import Interrupted
from qtool.system.errors import InputError, RunError


def show(outcome: Any, as_json: bool, more: Mapping[str, Any] | None = None) -> None:
    """Print what a command made, an outcome like ``run.Outcome``; ``more`` is said in JSON only."""
    paths = [str(path) for path in (outcome.path, *outcome.exports) if path is not None]
    if as_json:
        from pydantic_core import to_json

        result = {
            "path": str(outcome.path) if outcome.path else None,
            "exports": [str(path) for path in outcome.exports],
            "seconds": round(outcome.seconds, 3),
            **(more or {}),
            "report": outcome.report.model_dump(mode="json"),
        }
        print(to_json(result, inf_nan_mode="null").decode())
        return
    show_table(outcome.report)
    if paths:
        print()
    for path in paths:
        print(path)


def show_table(report: Any) -> None:
    """Print what has a table for a terminal and one in Markdown."""
    if sys.stdout.isatty() and hasattr(report, "render"):
        from rich.console import Console

        report.render(Console())
    else:
        print(report.markdown())


def describe(error: BaseException) -> tuple[str, int, str]:
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
