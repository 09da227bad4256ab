"""The context of a running command: progress on standard error, and the message after Ctrl-C."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from qtool.cli import progress_display
from qtool.cli.streams import unescaped
from qtool.system import interrupts, progress
from qtool.system.errors import QtoolError


class Interrupted(QtoolError):
    """Ctrl-C ended the command; the message says what it left behind."""

    exit_code = interrupts.EXIT_CODE


@contextmanager
def running(quiet: bool, output: Path | None) -> Iterator[None]:
    """Show progress, keep standard output for the result, and after Ctrl-C say what was written to ``output``."""
    if quiet:
        _silence()
    before = _identity(output)
    try:
        interrupts.check()
        with progress.use(progress_display.for_terminal(quiet)), redirect_stdout(sys.stderr):
            yield
            interrupts.check()
    except (Exception, KeyboardInterrupt) as error:
        if not (isinstance(error, KeyboardInterrupt) or interrupts.received()):
            raise
        raise Interrupted(_left_behind(output, before)) from error


@contextmanager
def starting(quiet: bool) -> Iterator[None]:
    """Load libraries inside the ``with`` block, which takes seconds, and say so on a terminal as long as it lasts.

    Standard output is kept for the result, as ``running`` does.
    """
    if quiet:
        _silence()
    shown = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    stream = unescaped(sys.stderr)
    if shown:
        stream.write("loading libraries ...")
        stream.flush()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if shown:
            stream.write("\r\x1b[K")
            stream.flush()


def _left_behind(output: Path | None, before: tuple[int, int] | None) -> str:
    """Return the message after Ctrl-C; ``before`` is the identity of ``output`` at the start."""
    if output is None:
        return "interrupted"
    if _identity(output) == before:
        begun = _partial(output) / "state"
        then = f"; run the same command again to continue from {begun.parent}" if begun.exists() else ""
        return f"interrupted; nothing was written under {output}{then}"
    again = "; run the same command again to continue" if _partial(output).exists() else ""
    return f"interrupted; {output} is complete, but the steps after it were not finished{again}"


QUIET = {  # environment variables that silence the progress bars and logs of libraries
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "LMEVAL_LOG_LEVEL": "ERROR",
    "WANDB_SILENT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}


def _silence() -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def _partial(path: Path) -> Path:
    """Return the folder of an unfinished run that writes ``path``."""
    real = path.resolve() if path.is_symlink() else path
    return real.with_name(f"{real.name}.partial")


def _identity(path: Path | None) -> tuple[int, int] | None:
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns) if status else None
