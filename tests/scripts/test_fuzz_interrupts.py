"""Commands that are ended at any operation on files go on to the same result: a sample of ``interrupts.py``."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz" / "interrupts.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["kill", "timed", "hup", "full"])
def test_a_command_that_was_ended_goes_on_to_the_same_result(kind: str) -> None:
    command = [sys.executable, str(SCRIPT), "--kind", kind, "--seed", "1", "--count", "14"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.startswith(f"{kind}: 14 trials over quantize, ")
    assert done.stdout.endswith("; 0 failed\n")
