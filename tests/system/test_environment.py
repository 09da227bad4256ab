"""The machine as reports name it."""

import os
import sys
from types import SimpleNamespace

import pytest

from qtool.system import environment, meminfo, memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says")
def test_the_machine_is_the_part_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.machine()
    assert found["processor"] == environment.processor()
    assert int(found["cores"]) == len(os.sched_getaffinity(0))
    assert memory.free_bytes() < meminfo.total_bytes()
    monkeypatch.setattr(meminfo, "total_bytes", lambda: 0)
    assert "memory" not in environment.machine()


def test_memory_is_within_the_limit_of_the_group(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    limit = os.path.join(tmp_path, "limit")
    monkeypatch.setattr(meminfo, "GROUP_LIMITS", ((limit, limit),))
    for text, total in (("max", None), ("600000", 600_000)):
        with open(limit, "w", encoding="ascii") as file:
            file.write(text)
        assert meminfo.total_bytes() == total or (total is None and meminfo.total_bytes() > 600_000)


def test_gpus_are_named_once_torch_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [SimpleNamespace(name="A", total_memory=80e9)] * 2 + [SimpleNamespace(name="B", total_memory=24e9)]
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: len(cards),
        get_device_properties=cards.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert environment.machine()["GPU"] == "2 x A, 80.0 GB; B, 24.0 GB"
    cuda.is_initialized = lambda: False
    assert "GPU" not in environment.machine()
