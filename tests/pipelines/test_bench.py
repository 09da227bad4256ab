"""``qtool bench --report``: the measured speed and memory reach the report of the checkpoint."""

from pathlib import Path

import pytest
from helpers.full_report import benched, full

from qtool.cli import main
from qtool.evaluation import bench as measuring
from qtool.reports.report import read_report

NAMES = ("report.json", "report.md", "report.html", "README.md")


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take the place of the measurement; return the folders that were measured."""
    folders: list[str] = []

    def bench(path: str, device: str, options: object) -> object:
        folders.append(path)
        return benched()

    monkeypatch.setattr(measuring, "bench", bench)
    return folders


def test_the_result_is_in_every_file_of_the_report(tmp_path: Path) -> None:
    full().model_copy(update={"bench": None}).write(tmp_path)
    assert main.main(["bench", str(tmp_path), "--report", "-q"]) == 0
    report = read_report(tmp_path)
    assert report == full()
    texts = [(tmp_path / name).read_text(encoding="utf-8") for name in NAMES]
    assert all("1.50 x" in text for text in texts[1:])
    assert "speed of decoding</dt><dd>1.50 x<small>100 to 150 tokens/s" in texts[2]
    assert "repeats of one measurement differ by up to 0% of their median" in texts[2]


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    assert main.main(["bench", str(tmp_path), "-q"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_report_is_refused_before_anything_is_measured(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["bench", str(tmp_path), "--report"]) == 2
    assert f"--report: {tmp_path} has no report.json; qtool eval {tmp_path} -o {tmp_path} writes one" in (
        capsys.readouterr().err
    )
    assert not measured
