"""The software and hardware that results depend on besides the recipe: versions, platform, processor and machine."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qtool.system import meminfo
from qtool.system.units import size
from qtool.system.version import __version__

PACKAGES = ("torch", "transformers", "lm_eval", "datasets")


def environment() -> dict[str, str]:
    """Return the versions of Python, the platform, qtool and the packages that results depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True), "qtool": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the CPU model name. It is part of the lock: the order of sums, and so the bits, depend on the CPU."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines() if known.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def machine() -> dict[str, str]:
    """Return the processor, the cores and the memory that the process may use, and the GPUs that torch computes on."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 0
    total, gpus = meminfo.total_bytes(), _gpus()
    found = {"processor": processor(), "cores": str(cores or ""), "memory": size(total) if total else "", "GPU": gpus}
    return {name: text for name, text in found.items() if text}


def _gpus() -> str:
    torch: Any = sys.modules.get("torch")  # Any: this module never imports torch
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_available() or not cuda.is_initialized():
        return ""
    known = [cuda.get_device_properties(i) for i in range(cuda.device_count())]
    names = [f"{each.name}, {size(each.total_memory)}" for each in known]
    return "; ".join(
        f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)
    )
