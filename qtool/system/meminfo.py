"""Memory as Linux reports it, of the machine and of the process's control group."""

import sys
from contextlib import suppress
from pathlib import Path

GROUP_LIMITS = (  # files with the limit and the use of memory of the process's control group
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def meminfo(field: str) -> int:
    """Return a number of bytes in ``/proc/meminfo``; 0 outside Linux."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
    return 0


def total_bytes() -> int:
    """Return the memory in bytes that the process may take at most; 0: unknown.

    It is the machine's, or less by the limit of the control group.
    """
    total = meminfo("MemTotal")
    for limit, _ in GROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            total = min(total or sys.maxsize, int(Path(limit).read_text(encoding="ascii")))
    return total
