"""Pages of reports fit a phone, a tablet and a laptop, as Chromium lays them out."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.full_report import full, linears

from qtool.reports import figures, html

SCRIPT = Path(__file__).parents[2] / "scripts" / "page_widths.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium"),
]


def measure(page: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(page)], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["some/model", "a" * 120])
def test_a_report_with_everything_fits(name: str, tmp_path: Path) -> None:
    report = full(name).model_copy(update={"linears": linears(name, blocks=40)})
    page = tmp_path / "report.html"
    page.write_text(html.page(report, figures.draw(report)), encoding="utf-8")
    done = measure(page)
    assert done.stdout.count(" px: fits\n") == 3, done.stdout + done.stderr
    assert done.returncode == 0


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    wide = "<div style='overflow: auto'><p style='width: 700px'>wide</p></div>"
    page.write_text(f"<!doctype html><body>{wide}<p>narrow</p>", encoding="utf-8")
    done = measure(page)
    assert done.returncode == 1
    assert "at 390 px: too wide\n    div : wide\n" in done.stdout
    assert "narrow" not in done.stdout
    assert "at 1280 px: fits\n" in done.stdout
