"""The context of a running command: progress on standard error, and the message after Ctrl-C."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from qtool.cli import progress_display
from qtool.system import progress
from qtool.system.errors import QtoolError


class Interrupted(QtoolError):
    """Ctrl-C ended the command; the message says what it left behind."""

    exit_code = 130


@contextmanager
def running(quiet: bool, output: Path | None) -> Iterator[None]:
    """Show progress, keep standard output for the result, and after Ctrl-C say what was written to ``output``."""
    if quiet:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    before = _identity(output)
    try:
        with progress.use(progress_display.for_terminal(quiet)), redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt as error:
        if output is None:
            raise Interrupted("interrupted") from error
        if _identity(output) == before:
            begun = _partial(output) / "state"
            then = f"; run the same command again to continue from {begun.parent}" if begun.exists() else ""
            raise Interrupted(f"interrupted; nothing was written under {output}{then}") from error
        again = "; run the same command again to continue" if _partial(output).exists() else ""
        raise Interrupted(
            f"interrupted; {output} is complete, but the steps after it were not finished{again}"
        ) from error


QUIET = {  # environment variables that silence the progress bars and logs of libraries
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "LMEVAL_LOG_LEVEL": "ERROR",
}


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


def terminate(number: int, frame: object) -> None:
    """End a run on SIGTERM as on Ctrl-C."""
    raise KeyboardInterrupt
