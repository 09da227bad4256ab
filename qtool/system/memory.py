"""Memory that the process does not need: pages of mapped weight files, and what the allocator keeps or returns.

safetensors maps files, so a loaded model occupies memory only where it has been read, and the pages that were read can
be dropped: the system reads them again from the file when they are needed. So a model larger than memory goes through
a run block by block. On systems without these calls nothing is dropped here; the system reclaims the pages later.
"""

import ctypes
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from mmap import PAGESIZE
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.system.meminfo import GROUP_LIMITS, meminfo

if TYPE_CHECKING:
    from torch import Tensor

ENOUGH = 3 * 2**28  # resident bytes below which nothing is returned; Python and torch take half of them
_WILL_NEED, _DO_NOT_NEED = 3, 4  # MADV_WILLNEED and MADV_DONTNEED of Linux's madvise
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's mallopt


class Pages:
    """The files that are mapped into the process now, and the tensors in them."""

    def __init__(self) -> None:
        """Read the addresses of the mappings; files that are mapped later are not included."""
        self._starts, self._ends = _mapped_files()

    def drop(self, *tensors: "Tensor") -> None:
        """Drop the pages of tensors that lie in mapped files.

        Use this only for tensors whose values have not changed since they were mapped: changes would be lost.
        """
        self._advise(tensors, _DO_NOT_NEED)

    def read_ahead(self, tensors: Iterable["Tensor"]) -> None:
        """Let the system read tensors that lie in mapped files in the background."""
        self._advise(tensors, _WILL_NEED)

    def _advise(self, tensors: Iterable["Tensor"], advice: int) -> None:
        if _libc is None:
            return
        for tensor in tensors:
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                continue
            # whole pages only: a page at the edge may hold a part of another tensor
            start = -(-tensor.data_ptr() // PAGESIZE) * PAGESIZE
            end = (tensor.data_ptr() + tensor.nbytes) // PAGESIZE * PAGESIZE
            at = bisect_right(self._starts, start) - 1
            if start < end and at >= 0 and end <= self._ends[at]:  # in ordinary memory the values would be lost
                _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(advice))


def free_bytes() -> int:
    """Return the memory in bytes that the process may still take, within the limit of its group; 0: unknown."""
    free = meminfo("MemAvailable")
    for limit, used in GROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            room = int(Path(limit).read_text(encoding="ascii")) - int(Path(used).read_text(encoding="ascii"))
            free = min(free or sys.maxsize, max(0, room))
    return free


def return_freed() -> None:
    """Return freed memory to the system: glibc keeps the holes between tensors, a fifth of the peak.

    Memory that was returned must be allocated again, which costs a small model a tenth of its time. So nothing is
    returned if the process holds less than ``ENOUGH``.
    """
    trim = getattr(_libc, "malloc_trim", None)  # musl has none
    if trim is not None and int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE > ENOUGH:
        trim(0)


def keep_freed() -> None:
    """Let glibc keep freed memory for the next tensor, however large; ``return_freed`` returns it.

    By itself glibc returns a large block as soon as it is freed, and the system fills each page of the next one with
    zeros when it is first written: 40 % of the time where most of a training is a head of many tokens
    (docs/log/speed.md). A variable of the environment that sets the allocator is left to decide.
    """
    mallopt = getattr(_libc, "mallopt", None)  # musl and macOS have none
    if mallopt is not None and not any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _mapped_files() -> tuple[list[int], list[int]]:
    """Return the start and end addresses of the process's file mappings, in order."""
    starts: list[int] = []
    ends: list[int] = []
    if _libc is None:
        return starts, ends
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        span, _, _, _, inode = line.split(maxsplit=5)[:5]
        if inode != "0":
            start, end = (int(side, 16) for side in span.split("-"))
            starts.append(start)
            ends.append(end)
    return starts, ends
