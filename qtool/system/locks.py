"""File locks: one process at a time."""

from pathlib import Path

from filelock import FileLock, Timeout

from qtool.system.errors import InputError


def hold(lock: Path, path: Path, taken: str) -> FileLock:
    """Acquire the file ``lock``, in a folder that is made for it, until its holder releases it or dies.

    Raises:
        InputError: ``taken``, where another process holds it; or ``path`` cannot be written.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        busy = FileLock(lock, mode=0o666)
        busy.acquire(blocking=False)
    except Timeout:
        raise InputError(taken) from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror} ({error.filename})") from None
    return busy
