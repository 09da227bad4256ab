"""Output folders that appear under their name only when they are complete, and the checks before one is written.

    <path>.partial/qtool.lock   lock file: held by the process that writes; marks the folder as made by qtool
    <path>.partial/model/       the content, which becomes <path>
    <path>.partial/replaced/    the folder that had the name before, from the moment it loses the name until the end

Only folders with a mark of qtool are ever replaced or removed: a manifest in a finished folder (``MARKS``), the lock
file in an unfinished one. Whatever appears under the name while the content is made stays, and is an error. A process
may be killed at any moment: ``OutputFolder.claim`` puts back what lost its name and was not replaced.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from qtool.system import locks, reading
from qtool.system.errors import InputError, RunError
from qtool.system.units import size

MARKS = ("qtool.json", "qtool_export.json")  # manifests: a folder with one of them was written by qtool
LOCK = "qtool.lock"  # lock file of an unfinished folder
RUN = "state/lock.json"  # file of an unfinished folder with which a run can go on (pipelines/run_state.py)


class OutputFolder:
    """A folder that is written beside its name, and gets the name when it is complete."""

    def __init__(self, path: Path) -> None:
        """Describe the folder ``path``. If that is a link, the folder it leads to is the one that is replaced."""
        self.path = path
        self._real = path.resolve() if path.is_symlink() else path
        self.partial = partial_of(path)
        self._before: tuple[object, ...] | None = None
        self._lock: FileLock | None = None

    @property
    def model(self) -> Path:
        """The folder that gets the name."""
        return self.partial / "model"

    @property
    def _replaced(self) -> Path:
        return self.partial / "replaced"

    def has_run(self) -> bool:
        """Return whether the unfinished folder is that of a run, which can go on."""
        return (self.partial / RUN).exists()

    @contextmanager
    def claim(self, taken: str) -> Iterator[None]:
        """Let no other process write the folder inside the ``with`` block; repair what a killed process left.

        Raises:
            InputError: another process writes it (the message is ``taken``), the folder cannot be made, or something
                that qtool did not make has the name of the unfinished folder.
        """
        if not _is_own_partial(self.partial):
            raise InputError(
                f"{self.partial} exists and was not made by qtool, which writes under that name until {self.path} is "
                "complete; move it away, or choose another folder"
            )
        self._lock = locks.hold(self.partial / LOCK, self.path, taken)
        try:
            if self._replaced.exists() and not os.path.lexists(self._real):
                self._replaced.rename(self._real)
            self._before = _identity(self._real)
            yield
        finally:
            self._lock.release()

    def publish(self) -> None:
        """Give ``model`` the name, in place of the folder that had it when it was claimed.

        Raises:
            RunError: something else has the name since then; it is left as it is.
        """
        now = _identity(self._real)
        if now != self._before:
            did = "appeared" if self._before is None else "changed"
            raise RunError(
                f"{self.path} {did} while this command worked, and was left as it is; move it away, and run the same "
                "command again"
            )
        if now is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)  # left by a process that was killed after it renamed
            self._real.rename(self._replaced)
        try:
            self.model.rename(self._real)
        except OSError:
            if now is not None:
                self._replaced.rename(self._real)
            raise

    def clear_abandoned(self) -> None:
        """Remove what a process left that was killed after the folder had its name, unless a run can go on there."""
        if self.partial.exists() and _is_own_partial(self.partial) and not self.has_run():
            with self.claim(f"another command is writing {self.path}; wait for it, or choose another folder"):
                self.remove()

    def remove(self) -> None:
        """Remove the unfinished folder, the lock file last, so that the rest is known as ours after a kill."""
        for entry in self.partial.iterdir() if self.partial.is_dir() else ():
            if entry.name != LOCK:
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        with suppress(OSError):
            (self.partial / LOCK).unlink(missing_ok=True)
            self.partial.rmdir()


def partial_of(path: Path) -> Path:
    """Return the folder in which ``path`` is made: ``<path>.partial``, beside the folder that a link leads to."""
    real = path.resolve() if path.is_symlink() else path
    return real.with_name(f"{real.name}.partial")


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool, source: Path | None = None) -> Iterator[Path]:
    """Give a folder to write into; it gets the name ``path`` after the ``with`` block, or is removed on an error.

    Raises:
        InputError: ``path`` may not be written or replaced (``check_folder``), its parent cannot be written, or another
            process writes it.
        RunError: writing failed, for example because the disk is full, or ``path`` appeared meanwhile.
    """
    check_folder(path, overwrite=overwrite, source=source)
    output = OutputFolder(path)
    if output.has_run():
        raise InputError(
            f"{output.partial} holds an unfinished run that writes {path}; run its command again to finish it, or "
            "choose another folder"
        )
    with output.claim(f"another command is writing {path}; wait for it, or choose another folder"):
        try:
            check_folder(path, overwrite=overwrite, source=source)  # again, now that nobody else writes
            shutil.rmtree(output.model, ignore_errors=True)
            output.model.mkdir()
            yield output.model
            output.publish()
        except (OSError, SafetensorError) as error:
            output.remove()
            raise failed(path, error) from error
        except BaseException:
            output.remove()
            raise
        output.remove()


def failed(path: Path, error: Exception) -> RunError:
    """Return the error to raise when ``error`` ended the writing of the folder ``path``."""
    left = "the old folder is as it was" if path.exists() else "nothing was left under that name"
    return RunError(f"writing {path} failed: {reason(error)}; {left}")


def reason(error: Exception) -> str:
    """Return the reason why writing failed, in words."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = "No space left" in str(error) or getattr(error, "errno", None) in codes
    return "the disk is full" if full else str(error)


def check_folder(path: Path, *, overwrite: bool, source: Path | None) -> None:
    """Refuse an output folder that may not be written or replaced; ``source`` is a folder that is read meanwhile.

    Raises:
        InputError: ``path`` has no name, overlaps ``source``, lies below a file, was not written by qtool, or exists
            and ``overwrite`` is not set.
    """
    if not path.name:
        raise InputError(f"{path} cannot be the output folder; give it a name")
    if source is not None and overlap(path, source):
        raise InputError(f"the output folder {path} overlaps {source}, which is read; choose another folder")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"{path} cannot be written: {above} is a file; choose another folder")
    if not path.exists():
        return
    if not path.is_dir() or not (is_marked(path) or not any(path.iterdir())):
        raise InputError(
            f"{path} exists and was not written by qtool ({' or '.join(MARKS)} would say so), so it will not be "
            "replaced; choose another folder"
        )
    if not overwrite:
        raise InputError(f"{path} exists; choose another folder, or pass --overwrite to replace it")


def overlap(one: Path, other: Path) -> bool:
    """Return whether two paths are the same, or one lies in the other; links are followed."""
    here, there = one.resolve(), other.resolve()
    return here == there or here in there.parents or there in here.parents


def is_marked(folder: Path) -> bool:
    """Return whether a folder holds a manifest of qtool."""
    for name in MARKS:
        with suppress(FileNotFoundError, InputError):
            if "format_version" in reading.read_object(folder / name):
                return True
    return False


def _is_own_partial(partial: Path) -> bool:
    """Return whether ``partial`` may be written and removed: it is not there, is empty, or has our lock file."""
    if not os.path.lexists(partial):
        return True
    if partial.is_symlink() or not partial.is_dir():
        return False
    return (partial / LOCK).is_file() or (partial / RUN).is_file() or not any(partial.iterdir())


def _identity(path: Path) -> tuple[object, ...] | None:
    """Return what tells a folder from one that has its name later, and its entries; ``None`` if there is nothing."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, tuple(sorted(os.listdir(path))) if path.is_dir() else ()


def check_space(path: Path, needed: int) -> None:
    """Refuse an output folder if ``needed`` bytes do not fit on its disk."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{path} needs about {size(needed)}, and {folder} has {size(free)} free; free some space, or "
            "choose a folder on another disk"
        )


def clear(folder: Path) -> None:
    """Remove everything in ``folder``."""
    shutil.rmtree(folder)
    folder.mkdir()
