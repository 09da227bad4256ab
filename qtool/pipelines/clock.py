"""The time of each phase of a run, and the peak memory of the process at the end of each phase.

Peaks are of the process since its start, not of the phase alone: to reset them would hide the earlier peaks from anyone
who measures the process from outside.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from qtool.reports.report import Report
from qtool.system import peaks, progress
from qtool.system.environment import machine


@dataclass
class PhaseTimer:
    """The wall time of each phase, and the peak memory at its end."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    peak_gpu_bytes: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        """Time the ``with`` block as the phase ``name``, and show it as ``title``."""
        start = time.perf_counter()
        with progress.stage(title):
            yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        measured = (self.peak_bytes, peaks.peak_memory_bytes()), (self.peak_gpu_bytes, peaks.peak_gpu_bytes())
        for found, peak in measured:
            if peak:  # 0: no GPU, or the system does not report a peak
                found[name] = max([peak, *found.values()])  # Linux counts pages late: a later reading may be lower

    def measured(self) -> dict[str, Any]:
        """Return the fields of a report that this timer fills."""
        held = {"peak_bytes": self.peak_bytes, "peak_gpu_bytes": self.peak_gpu_bytes}
        return {"seconds": self.seconds, **held, "machine": machine()}

    def added_to(self, report: Report) -> Report:
        """Return ``report`` with the phases of this process added to those of earlier starts of the run."""
        measured = {name: getattr(report, name) | found for name, found in self.measured().items()}
        return report.model_copy(update=measured)

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started
