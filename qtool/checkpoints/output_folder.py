"""Output folders that appear under their name only when they are complete, and the checks before one is written.

A folder is written as ``<path>.partial`` and renamed at the end, so that nobody finds half a checkpoint. A folder that
is overwritten is moved aside first and removed last: if the new one fails, the old one is still there.
"""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qtool.system.errors import InputError, RunError


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool, source: Path | None = None) -> Iterator[Path]:
    """Give a folder ``<path>.partial`` to write into; rename it to ``path`` after the ``with`` block, or remove it.

    Raises:
        InputError: ``path`` may not be written or replaced (``check_folder``), or its parent cannot be written.
        RunError: writing failed, for example because the disk is full.
    """
    check_folder(path, overwrite=overwrite, source=source)
    partial = path.with_name(f"{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror} ({error.filename})") from None
    replaced = None
    try:
        yield partial
        if path.exists():
            replaced = swap(path, partial)
        else:
            partial.rename(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise failed(path, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def failed(path: Path, error: Exception) -> RunError:
    """Return the error to raise when ``error`` ended the writing of the folder ``path``."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = "No space left" in str(error) or getattr(error, "errno", None) in codes
    reason = "the disk is full" if full else str(error)
    left = "the old folder is as it was" if path.exists() else "nothing was left under that name"
    return RunError(f"writing {path} failed: {reason}; {left}")


def check_folder(path: Path, *, overwrite: bool, source: Path | None) -> None:
    """Refuse an output folder that may not be written or replaced; ``source`` is a folder that is read meanwhile.

    Raises:
        InputError: ``path`` has no name, overlaps ``source``, lies below a file, is no model folder, or exists and
            ``overwrite`` is not set.
    """
    if not path.name:
        raise InputError(f"{path} cannot be the output folder; give it a name")
    if source is not None:
        here, there = path.resolve(), source.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise InputError(f"the output folder {path} overlaps {source}, which is read; choose another folder")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"{path} cannot be written: {above} is a file; choose another folder")
    if not path.exists():
        return
    if not path.is_dir() or not ((path / "config.json").exists() or not any(path.iterdir())):
        raise InputError(f"{path} exists and is not a model folder, so it will not be replaced; choose another folder")
    if not overwrite:
        raise InputError(f"{path} exists; choose another folder, or pass --overwrite to replace it")


def swap(path: Path, partial: Path) -> Path:
    """Put ``partial`` in the place of ``path``; return the folder that holds the old one, for the caller to remove."""
    path = path.resolve()  # if it is a link, the folder that it leads to is replaced
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    path.rename(aside / path.name)
    try:
        partial.rename(path)
    except OSError:
        (aside / path.name).rename(path)
        aside.rmdir()
        raise
    return aside


def check_space(path: Path, needed: int) -> None:
    """Refuse an output folder if ``needed`` bytes do not fit on its disk."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{path} needs about {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free; free some space, or "
            "choose a folder on another disk"
        )


def clear(folder: Path) -> None:
    """Remove everything in ``folder``."""
    shutil.rmtree(folder)
    folder.mkdir()
