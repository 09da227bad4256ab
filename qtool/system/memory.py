"""Memory that the process holds without need: pages of mapped weight files, and holes left by the allocator.

safetensors maps files, so a loaded model occupies memory only where it has been touched, and whatever was touched can
be dropped: it is read again from the file when it is needed. That is how a model larger than memory goes through a run
block by block. On systems without these calls nothing is dropped; the system then reclaims such pages by itself, later.
"""

import ctypes
import sys
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from mmap import PAGESIZE
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.system.units import size

if TYPE_CHECKING:
    from torch import Tensor

ENOUGH = 3 * 2**28  # bytes, of which Python and torch take half
_WILL_NEED, _DO_NOT_NEED = 3, 4  # of Linux's madvise


class Pages:
    """The mappings of files that the process has now, and the tensors in them."""

    def __init__(self) -> None:
        """Read where they are; files mapped later are not among them."""
        self._starts, self._ends = _mapped_files()

    def drop(self, *tensors: "Tensor") -> None:
        """Let go of the pages of tensors that lie in mapped files.

        Only for tensors whose values nobody has changed since they were mapped: changes would be lost.
        """
        self._advise(tensors, _DO_NOT_NEED)

    def read_ahead(self, tensors: Iterable["Tensor"]) -> None:
        """Have the system read tensors that lie in mapped files, while the caller goes on."""
        self._advise(tensors, _WILL_NEED)

    def _advise(self, tensors: Iterable["Tensor"], advice: int) -> None:
        if _libc is None:
            return
        for tensor in tensors:
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                continue
            # whole pages only: those at the edges may hold a part of another tensor
            start = -(-tensor.data_ptr() // PAGESIZE) * PAGESIZE
            end = (tensor.data_ptr() + tensor.nbytes) // PAGESIZE * PAGESIZE
            at = bisect_right(self._starts, start) - 1
            if start < end and at >= 0 and end <= self._ends[at]:  # else it is ordinary memory, and would be lost
                _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(advice))


def return_freed() -> None:
    """Give the system what has been freed: glibc keeps the holes between tensors, a fifth of the peak.

    What is returned has to be fetched again, which costs a small model a tenth of its time: where the process holds
    less than ``ENOUGH``, nothing is done.
    """
    trim = getattr(_libc, "malloc_trim", None)  # musl has none
    if trim is not None and int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE > ENOUGH:
        trim(0)


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _mapped_files() -> tuple[list[int], list[int]]:
    """Where the process's mappings of files begin and end, in order of address."""
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


def status_bytes(field: str) -> int | None:
    """Return a size in ``/proc/self/status``, e.g. ``VmRSS`` (held now) or ``VmHWM`` (peak); ``None`` outside Linux."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def peak_memory_bytes() -> int:
    """The most resident memory this process has held so far; 0 where the system does not tell."""
    peak = status_bytes("VmHWM")  # on Linux getrusage also counts the parent's memory at the time of the fork
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes() -> int:
    """The most GPU memory torch has allocated on one device; 0 without torch loaded, or without a GPU in use."""
    torch: Any = sys.modules.get("torch")  # Any: never imported from here
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_available() or not cuda.is_initialized():
        return 0
    return max(int(cuda.max_memory_allocated(i)) for i in range(cuda.device_count()))


def memory() -> str:
    """Peak memory in words, with the GPU's where there is one in use."""
    gpu = peak_gpu_bytes()
    return f"peak {size(peak_memory_bytes())}" + (f", GPU {size(gpu)}" if gpu else "")
