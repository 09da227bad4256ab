"""Read the machine's energy counters: RAPL for processor and memory on Linux, NVML for an NVIDIA GPU."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
MICROJOULES = 1e-6
MILLIJOULES = 1e-3


@dataclass(frozen=True)
class Counter:
    """A counter that only grows, and starts again at zero when it reaches ``wraps_at``."""

    name: str
    read: Callable[[], int]
    unit: float  # joules per count
    wraps_at: int | None = None


@dataclass(frozen=True)
class Meter:
    """The energy counters of the processor, its memory and the GPU; if there are none, ``source`` says why."""

    counters: tuple[Counter, ...]
    source: str

    def read(self) -> tuple[int, ...]:
        """Return the present state of the counters, for :meth:`joules`."""
        return tuple(counter.read() for counter in self.counters)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float | None:
        """Return the energy between two readings, ``None`` without counters; a counter may wrap once between them."""
        if not self.counters:
            return None
        total = 0.0
        for counter, start, end in zip(self.counters, before, after, strict=True):
            if end < start and counter.wraps_at is not None:
                end += counter.wraps_at
            total += (end - start) * counter.unit
        return total


def meter(gpu_uuid: str | None = None, powercap: Path = POWERCAP) -> Meter:
    """Return the counters of the processor packages and their memory, and of the GPU with this UUID if given."""
    counters, missing = _rapl(powercap)
    if gpu_uuid is not None:
        gpu = _nvml(gpu_uuid)
        if isinstance(gpu, str):
            return Meter((), gpu)  # the energy of the processor alone would mislead
        counters.append(gpu)
    if not counters:
        return Meter((), missing)
    return Meter(tuple(counters), " + ".join(counter.name for counter in counters))


def _rapl(powercap: Path) -> tuple[list[Counter], str]:
    """Return the counters below ``powercap``, and the reason if there are none."""
    counters, unreadable = [], False
    # AMD processors use this name, too; intel-rapl-mmio repeats the packages
    for zone in sorted(powercap.glob("intel-rapl:*")):
        file = zone / "energy_uj"
        with suppress(OSError, ValueError):
            name = (zone / "name").read_text(encoding="ascii").strip()
            if not name.startswith(("package", "dram")):
                continue  # cores and graphics are inside the package, psys is the whole machine
            try:
                int(file.read_text(encoding="ascii"))
            except PermissionError:
                unreadable = True
                continue
            wraps_at = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
            counters.append(Counter(f"RAPL {name}", _reader(file), MICROJOULES, wraps_at))
    if unreadable and not counters:
        return [], f"not measured: the energy counters under {powercap} may be read by root only"
    return counters, f"not measured: this machine exposes no energy counter ({powercap} has none)"


def _reader(file: Path) -> Callable[[], int]:
    return lambda: int(file.read_text(encoding="ascii"))


def _nvml(uuid: str) -> Counter | str:
    """Return the counter of a GPU, or the reason why there is none."""
    try:
        import pynvml
    except ImportError:
        return "not measured: pip install nvidia-ml-py to read the GPU's energy counter"
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except pynvml.NVMLError as error:
        return f"not measured: the GPU's energy counter cannot be read ({error})"
    return Counter("NVML GPU", lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)), MILLIJOULES)
