"""A sample of the fuzzers: inputs with random faults are right or refused, never a traceback, a bug, or slow."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "scripts" / "fuzz"


@pytest.mark.slow
@pytest.mark.parametrize(("script", "count"), [("recipes.py", 300), ("folders.py", 30)])
def test_inputs_with_random_faults_are_right_or_refused(script: str, count: int) -> None:
    command = [sys.executable, str(FUZZ / script), "--seed", "1", "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"{count} inputs: " in done.stdout
    assert '0 tracebacks, 0 "bug in qtool", 0 over 5 s of CPU' in done.stdout
