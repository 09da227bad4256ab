"""Temporary folders that the next command removes if the process that made them was killed.

Each holds a lock file, which its process locks as long as it lives: a folder whose lock is free has no owner.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from qtool.system import interrupts

PREFIX = ".qtool-"  # prefix of the names of temporary folders
LOCK = "qtool.lock"  # name of their lock file


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Give an empty folder below ``parent``, by default the system's folder for temporary files; remove it at the end.

    Folders of killed processes below ``parent`` are removed first.
    """
    above = Path(tempfile.gettempdir()) if parent is None else parent
    clear_abandoned(above)
    with interrupts.deferred():
        folder, lock = _owned(above)
    try:
        content = folder / "content"
        content.mkdir()
        yield content
    finally:
        with interrupts.deferred():
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)  # where an open file cannot be removed


@cache
def process_folder() -> Path:
    """Return a temporary folder that is removed when the process ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(temporary_folder())


def _owned(above: Path) -> tuple[Path, FileLock]:
    """Make a folder and lock it; try again if another process took it for an abandoned one before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=above))
        lock = FileLock(folder / LOCK)
        with suppress(FileNotFoundError, Timeout):
            lock.acquire(blocking=False)
            if (folder / LOCK).exists():
                return folder, lock
            lock.release()


def clear_abandoned(above: Path) -> None:
    """Remove the temporary folders in ``above`` whose processes are gone; those of other users stay."""
    for folder in above.glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):
            if folder.is_symlink() or (hasattr(os, "getuid") and folder.stat().st_uid != os.getuid()):
                continue
            if not (folder / LOCK).is_file():
                folder.rmdir()  # fails if there is anything in it
                continue
            lock = FileLock(folder / LOCK)
            lock.acquire(blocking=False)
            try:
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                lock.release()
