"""The tables of engines in docs are those of the code."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WRITER = ROOT / "scripts" / "make_engine_tables.py"


def run(*arguments: str, code: str = "pass") -> subprocess.CompletedProcess[str]:
    """Run the writer of the tables after ``code``, in a process of its own."""
    start = f"import sys, runpy; {code}; sys.argv[1:] = {[*arguments]!r}; "
    command = start + f"runpy.run_path({str(WRITER)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT)


def test_the_tables_say_what_the_code_knows() -> None:
    same = run("--check")
    assert same.returncode == 0, same.stdout + same.stderr
    other = "from qtool.config import engines as e; e.READS = tuple(r._replace(note='other') for r in e.READS)"
    changed = run("--check", code=other)
    assert changed.returncode == 1
    assert "docs/deploy/vllm.md and " in changed.stdout
    assert "docs/deploy/onnxruntime.md differ from qtool/config/engines.py" in changed.stdout
