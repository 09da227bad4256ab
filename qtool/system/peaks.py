"""Peaks of memory: of the process, and of the GPU that torch uses."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from qtool.system.units import size


def peak_memory_bytes() -> int:
    """Return the peak of the process's resident memory in bytes, or 0 if the system does not report it."""
    peak = status_bytes("VmHWM")  # on Linux getrusage also counts the parent's memory at the time of the fork
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes() -> int:
    """Return the most bytes that torch has allocated on one GPU; 0 if torch is not loaded or no GPU is in use."""
    torch: Any = sys.modules.get("torch")  # Any: this module never imports torch
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_available() or not cuda.is_initialized():
        return 0
    return max(int(cuda.max_memory_allocated(i)) for i in range(cuda.device_count()))


def peaks_in_words() -> str:
    """Return the peak memory as text, with that of the GPU if one is in use."""
    gpu = peak_gpu_bytes()
    return f"peak {size(peak_memory_bytes())}" + (f", GPU {size(gpu)}" if gpu else "")


def status_bytes(field: str) -> int | None:
    """Return a size in ``/proc/self/status``, e.g. ``VmRSS`` (held now) or ``VmHWM`` (peak); ``None`` outside Linux."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
