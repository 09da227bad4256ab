"""The software and hardware that results depend on besides the recipe: versions, platform and processor."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
