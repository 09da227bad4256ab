"""Memory that the process holds without need."""

import ctypes
import sys


def return_freed() -> None:
    """Give the system what has been freed: glibc keeps the holes between tensors."""
    trim = getattr(_libc, "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
