"""File locks, which let one process work in a folder at a time."""

from pathlib import Path

from filelock import FileLock, Timeout

from qtool.system.errors import InputError


def hold(lock: Path, path: Path, taken: str) -> FileLock:
    """Acquire the file ``lock``, and make its folder. The lock holds until it is released or the process ends.

    Raises:
        InputError: Another process holds the lock, with the message ``taken``; or ``path`` cannot be written.
    """
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            busy = FileLock(lock, mode=0o666)
            busy.acquire(blocking=False)
        except Timeout:
            raise InputError(taken) from None
        except OSError as error:
            above = next(parent for parent in path.absolute().parents if parent.exists())
            raise InputError(
                f"{path} cannot be written: no folder can be made in {above} ({error.strerror}); choose another folder"
            ) from None
        if lock.exists():
            return busy
        busy.release()  # its last owner removed the file between our opening it and our locking it
