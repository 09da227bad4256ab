"""The cost of a child process, as the kernel counts it."""

from __future__ import annotations

import os
import subprocess
import sys

# ru_maxrss is in bytes on macOS, in KiB elsewhere
UNIT = 1 if sys.platform == "darwin" else 1024


def wait(child: subprocess.Popen[str] | subprocess.Popen[bytes]) -> tuple[float, int]:
    """Wait for ``child`` to end, whose ``returncode`` is then set; return its CPU seconds and peak memory in bytes."""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * UNIT
