"""scripts/bench/peers.py measures qtool by itself; peers need environments of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qtool

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.mark.slow
def test_a_method_is_measured_and_its_quality_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    needed = ("enwiki", "wikitext2")
    known = Path(os.environ.get("QTOOL_DATA_DIR", BENCH.parents[2] / "shared" / "data"))
    if not all((known / name).is_dir() for name in needed):
        pytest.skip("needs enwiki and wikitext2 below QTOOL_DATA_DIR")
    command = [sys.executable, str(BENCH / "peers.py"), "--model", "builtin", "--data", str(known), "--bits", "8", "2"]
    command += ["--num-samples", "4", "--seq-len", "64", "--eval-len", "64", "--eval-windows", "4", "--repeats", "1"]
    found = tmp_path / "found.json"
    done = subprocess.run([*command, "--warm-ups", "0", "--json", str(found)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(found.read_text())
    assert outcome["versions"]["qtool"]["qtool"] == qtool.__version__
    fine, coarse = outcome["results"]
    assert 0 < fine["kl"] < 0.01 < coarse["kl"]
    assert fine["perplexity"] == pytest.approx(outcome["float_perplexity"], rel=0.01)
    assert fine["perplexity"] < coarse["perplexity"]
    assert all(value > 0 for row in (fine, coarse) for value in row["median"].values())
    assert "| qtool gptq | 2 |" in done.stdout
