"""``qtool doctor`` finds missing packages, devices and data, also where qtool itself is not installed."""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from helpers.timings import told

from qtool.cli import doctor, main


def _distribution(monkeypatch: pytest.MonkeyPatch, requires: list[str], versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda _: requires)
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "_devices", lambda: (DEVICES, None))
    monkeypatch.setattr(doctor, "_data", lambda: {"folder": None, "found": []})
    monkeypatch.setattr(doctor, "_speeds", list)


DEVICES: dict[str, Any] = {
    "cpu": "A CPU",
    "cores": 2,
    "memory_bytes": 16 * 10**9,
    "torch_threads": 2,
    "cuda": "13.0",
    "gpus": [{"name": "A GPU", "memory_bytes": 24 * 10**9, "free_bytes": 20 * 10**9}],
}


def test_doctor_finds_what_is_missing_or_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requires = ["torch>=2.6,<3", "rich", "typer>=1", 'pytest; extra == "test"', 'gone; python_version < "3"']
    _distribution(monkeypatch, requires, {"torch": "2.13.0+cpu", "typer": "0.29.2"})
    assert main.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert set(found["packages"]) == {"torch", "rich", "typer"}
    assert found["packages"]["torch"] == {"version": "2.13.0+cpu", "needs": ">=2.6,<3", "ok": True}
    assert found["problems"] == [
        'rich is missing: pip install "rich"',
        'typer 0.29.2 does not fit, it must be >=1: pip install "typer>=1"',
    ]


def test_doctor_is_content_where_all_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _distribution(monkeypatch, ["torch>=2.6"], {"torch": "2.13.0", "wandb": "1.0"})
    assert main.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for each in ("A GPU, 24.0 GB, 20.0 GB free", "2 cores, 2 threads, 16.0 GB", "set QTOOL_DATA_DIR", "all is well"):
        assert each in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("torch", "newer"), [("2.13.0", False), ("2.13.0+cpu", False), ("2.9.1", False), ("2.13.1", True)]
)
def test_doctor_says_that_torch_is_newer_than_what_was_tested(
    monkeypatch: pytest.MonkeyPatch, torch: str, newer: bool
) -> None:
    monkeypatch.setattr(doctor, "TESTED_TORCH", "2.13.0")
    _distribution(monkeypatch, ["torch>=2.6"], {"torch": torch})
    found = doctor.doctor()
    note = f"torch {torch} is newer than 2.13.0, the newest that qtool was tested with"
    assert found["notes"] == ([note] if newer else [])
    assert (f"notes\n  {note}\nall is well" in doctor.render(found)) is newer


def test_doctor_says_how_an_extra_is_installed_only_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    _distribution(monkeypatch, [], {"gguf": "0.19.0"})
    lines = doctor.render(doctor.doctor()).splitlines()
    assert any(line.endswith('tasks such as boolq and mmlu: pip install "qtool-llm[tasks]"') for line in lines)
    assert any(line.endswith("writes and reads gguf exports") for line in lines)


def test_doctor_shows_which_kernel_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without instructions for bfloat16: torch's int4 product is slower than the dense one."""
    speeds, ways = (
        doctor._speeds,
        {"dense float32": 0.09, "dense bfloat16": 0.2, "int4": 0.2, "ort": 0.03, "exact": 0.9},
    )
    _distribution(monkeypatch, [], {})
    told(monkeypatch, ways)
    monkeypatch.setattr(doctor, "_speeds", speeds)
    found = doctor.doctor()
    assert [row["fastest"] for row in found["speeds"]] == ["ort"] * 4
    assert found["speeds"][2]["speedups"]["int4"] == pytest.approx(0.45)
    lines = doctor.render(found).splitlines()
    assert (
        "  4 bits" + " " * 14 + "ort 3.00 x, dense float32 1.00 x, int4 0.45 x, dense bfloat16 0.45 x, exact 0.10 x"
        in lines
    )
    assert any(line.startswith("  torch: int4, cpu ") and "active; input and scales" in line for line in lines)
    assert any(line.startswith("  ort, cpu ") and "not exact: input rounded to 8 bits" in line for line in lines)


def test_doctor_says_when_torch_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # makes its import fail
    found, fault = doctor._devices()
    assert fault is not None
    assert fault.startswith("torch cannot be imported")
    assert found["torch_threads"] is None


def test_memory_is_limited_by_the_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"

    def path(name: str) -> Path:
        return limit if name == "/sys/fs/cgroup/memory.max" else tmp_path / "none"

    monkeypatch.setattr(doctor, "Path", path)
    limit.write_text("max")
    whole = doctor._memory_bytes()
    limit.write_text("1000000")
    assert doctor._memory_bytes() == 1_000_000 < whole


def test_doctor_says_when_qtool_runs_from_a_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    found = doctor.doctor()
    assert found["packages"] == {}
    assert any(line.startswith("qtool is not installed") and "pip install -e" in line for line in found["problems"])
    assert "problems" in doctor.render(found)


@pytest.mark.parametrize(
    ("offline", "proxies", "answers", "words"),
    [
        (True, {}, True, "offline (HF_HUB_OFFLINE)"),
        (False, {}, True, "https://hub.test answers"),
        (False, {}, False, "https://hub.test does not answer"),
        (False, {"https": "http://proxy.test"}, True, "https://hub.test through a proxy, not tried"),
    ],
)
def test_doctor_says_that_the_hub_answers_only_if_it_does(
    monkeypatch: pytest.MonkeyPatch, offline: bool, proxies: dict[str, str], answers: bool, words: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.test")
    monkeypatch.setattr("qtool.data.hub.hub_answers", lambda: answers)
    monkeypatch.setattr(doctor, "getproxies", lambda: proxies)
    assert doctor._reached(doctor._hub()) == words
