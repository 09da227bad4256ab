"""Writing of files that a user reads: each appears complete or not at all, and never through a link."""

import os
from collections.abc import Iterable
from pathlib import Path

from qtool.system.errors import InputError


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text; a reader finds the old content or the new one."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Write ``content``; a reader finds the old content or the new one."""
    partial = file.with_name(f"{file.name}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(partial, flags, 0o666), "wb") as opened:
            opened.write(content)
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def make_folder(folder: Path, names: Iterable[str], *, ours: bool) -> None:
    """Make a folder for files ``names``; refuse one where others have files or links of these names.

    ``ours`` says that qtool wrote such files there before, so that they may be replaced.

    Raises:
        InputError: the folder cannot be made, or a name is taken.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be made: {getattr(error, 'strerror', None) or error}") from None
    for name in names:
        file = folder / name
        if file.is_symlink():
            raise InputError(f"{file} is a link, and would be written; remove it, or choose another folder")
        if file.exists() and not ours:
            raise InputError(
                f"{file} exists and was not written by qtool, so it will not be replaced; choose another folder"
            )
