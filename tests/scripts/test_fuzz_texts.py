"""Damaged texts, token files and tokenizers are read rightly or refused: a sample of ``scripts/fuzz/texts.py``."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz" / "texts.py"


@pytest.mark.slow
def test_no_damaged_text_ends_in_a_traceback_or_takes_long() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--seed", "7", "--count", "60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("60 texts: ")
    assert done.stdout.endswith(" 0 tracebacks, 0 slow\n")
    assert not done.stdout.startswith("60 texts: 0 right")
