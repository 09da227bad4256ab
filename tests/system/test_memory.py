"""Peak memory of this process and of its GPUs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from qtool.system import peaks


def test_peak_memory_counts_this_process() -> None:
    before = peaks.peak_memory_bytes()
    block = bytearray(before)  # doubles the memory in use
    block[::4096] = b"x" * len(block[::4096])
    assert peaks.peak_memory_bytes() >= 1.5 * before > 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage counts the parent on Linux")
def test_peak_memory_does_not_count_the_parent() -> None:
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from qtool.system import peaks; print(peaks.peak_memory_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1e6 < int(child.stdout) < 200e6


def test_gpu_memory_is_shown_only_where_a_gpu_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert peaks.peak_gpu_bytes() == 0
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        max_memory_allocated=lambda i: (i + 1) * 10**9,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert peaks.peaks_in_words().endswith(", GPU 2.0 GB")
    cuda.is_initialized = lambda: False
    assert "GPU" not in peaks.peaks_in_words()
