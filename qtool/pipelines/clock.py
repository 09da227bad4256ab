"""How long each phase of a run took, and the most memory that the process had held by its end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from qtool.system import memory, progress


@dataclass
class PhaseTimer:
    """Wall time by phase, and peaks of memory.

    A peak is that of the process so far and not of the phase: forgetting the earlier ones would hide them from whoever
    measures the process from outside.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    peak_gpu_bytes: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        """Run the block as the phase ``name``, shown as ``title``."""
        start = time.perf_counter()
        with progress.stage(title):
            yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        peaks = (self.peak_bytes, memory.peak_memory_bytes()), (self.peak_gpu_bytes, memory.peak_gpu_bytes())
        for found, peak in peaks:
            if peak:  # 0: there is none, or the system does not tell
                found[name] = max([peak, *found.values()])  # Linux counts pages a little late

    def measured(self) -> dict[str, Any]:
        """The fields of a report."""
        return {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "peak_gpu_bytes": self.peak_gpu_bytes}

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started
