"""The end of a process by a signal: Ctrl-C, SIGTERM, or SIGHUP, which a closed terminal sends.

The command line calls ``install``. The first signal raises ``KeyboardInterrupt``, so that every ``with`` block and
``finally`` clears up; the second lets them finish; a third ends the process at once. In a process that did not call
``install``, such as one that uses the Python API, nothing here has an effect.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import current_thread, main_thread
from types import FrameType

EXIT_CODE = 130
LAST = 3  # number of the signal that ends the process at once

_received = 0  # signals so far
_deferred = 0  # blocks that are running and must not be interrupted


def install() -> None:
    """Handle the signals; one that is ignored stays so, as nohup and background jobs of a shell want it."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _receive)


def _receive(number: int, frame: FrameType | None) -> None:
    global _received
    if number == getattr(signal, "SIGHUP", None) and _received:
        return  # a terminal that closes sends several
    _received += 1
    if _received >= LAST:
        with suppress(OSError, ValueError):
            if os.isatty(2):
                os.write(2, b"\x1b[?25h\n")  # the live display hides the cursor
        os._exit(EXIT_CODE)
    if _received == 1 and not _deferred:
        raise KeyboardInterrupt


def received() -> bool:
    """Return whether a signal has asked this process to end."""
    return _received > 0


def check() -> None:
    """Raise ``KeyboardInterrupt`` in the main thread if a signal came, also if code of others swallowed the first."""
    if _received and current_thread() is main_thread():
        raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[None]:
    """Put off an interruption until the end of the ``with`` block, which must be short.

    Signals interrupt the main thread only, so in other threads this does nothing.
    """
    global _deferred
    if current_thread() is not main_thread():
        yield
        return
    before = _received
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    if not before and not _deferred:
        check()


@contextmanager
def as_exceptions() -> Iterator[None]:
    """Let each Ctrl-C inside the ``with`` block raise ``KeyboardInterrupt``, without a request to end the process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def finish() -> None:
    """Let signals no longer interrupt: the work is done, and only its result or an error is still to be printed."""
    global _deferred
    _deferred += 1
