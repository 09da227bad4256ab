"""What every command does around its one call: progress on standard error, the result on standard output, errors."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import typer

from qtool.errors import InputError, QtoolError, RunError


class Interrupted(QtoolError):
    """Ctrl-C, with what it left behind."""

    exit_code = 130


@contextmanager
def running(quiet: bool, output: Path | None) -> Iterator[None]:
    """Show progress, keep standard output for the result, and say what Ctrl-C left of ``output``."""
    from qtool import progress

    if quiet:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    before = _identity(output)
    try:
        with progress.use(progress.for_terminal(quiet)), redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt as error:
        if output is None:
            raise Interrupted("interrupted") from error
        if _identity(output) == before:
            begun = output.with_name(f"{output.name}.partial") / "state"
            then = f"; the same command goes on from {begun.parent}" if begun.exists() else ""
            raise Interrupted(f"interrupted; nothing was written under {output}{then}") from error
        raise Interrupted(f"interrupted; {output} is complete, but not what was to follow it") from error


QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "LMEVAL_LOG_LEVEL": "ERROR",
}


def _identity(path: Path | None) -> tuple[int, int] | None:
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns) if status else None


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
    if sys.stdout.isatty() and hasattr(outcome.report, "render"):
        from rich.console import Console

        outcome.report.render(Console())
    else:
        print(outcome.report.markdown())
    if paths:
        print()
    for path in paths:
        print(path)


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
