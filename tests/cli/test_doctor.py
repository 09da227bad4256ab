"""``qtool doctor`` reads what qtool needs from the installed package, and says so where there is none."""

from importlib import metadata

import pytest

from qtool.cli import doctor


def test_doctor_says_when_qtool_runs_from_a_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    found = doctor.doctor()
    assert found["packages"] == {}
    assert any(line.startswith("qtool is not installed") and "pip install -e" in line for line in found["problems"])
    assert "problems" in doctor.render(found)
