"""scripts/bench/peers.py measures qtool by itself; peers need environments of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.local_data import needs

import qtool
from qtool.data import sources

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.mark.slow
@needs("enwiki/train.txt.xz", "wikitext2/test.jsonl")
def test_a_method_is_measured_and_its_quality_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    known = sources.data_dir()
    assert known is not None
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
