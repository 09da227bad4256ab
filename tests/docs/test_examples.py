"""The examples: each runs to its end as it stands, with fewer windows; the notebook was saved with its outputs."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = "builtin:wiki-llama-3m"
SMALL = ["data.num_samples=8", "data.seq_len=64", "eval.limit=1", "eval.context=64", "eval.continuations=0"]
NOTEBOOK: dict[str, Any] = json.loads((EXAMPLES / "quantize.ipynb").read_text(encoding="utf-8"))


def cells() -> list[dict[str, Any]]:
    return [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment with a command ``qtool`` that is this source tree."""
    command = tmp_path / "bin" / "qtool"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qtool "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(EXAMPLES.parent)}


def script(name: str, *arguments: str, where: Path, environment: dict[str, str]) -> str:
    """Run a script with the settings of ``SMALL``; return what it printed."""
    options = [text for setting in SMALL for text in ("--set", setting)]
    command = ["sh", str(EXAMPLES / name), *arguments, *options]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_model_for_llama_cpp(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = script("ptq_to_llama_cpp.sh", MODEL, "out/lc", where=tmp_path, environment=environment)
    assert (tmp_path / "out" / "lc-gguf" / "model.gguf").is_file()
    assert "| generated" in printed.split("\nout/lc-gguf\n")[1], "the file was not measured"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_methods_at_2_bits_compared(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = script("efficientqat_2bits.sh", MODEL, "out/2", where=tmp_path, environment=environment)
    assert {path.name for path in (tmp_path / "out" / "2").iterdir()} >= {"gptq", "efficientqat", "compare"}
    assert "efficientqat w2g64 asym" in printed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_own_conversations(tmp_path: Path, environment: dict[str, str]) -> None:
    data = str(EXAMPLES / "chat.jsonl")
    printed = script("chat_data.sh", MODEL, data, "out/chat", where=tmp_path, environment=environment)
    report = json.loads((tmp_path / "out" / "chat" / "report.json").read_text(encoding="utf-8"))
    assert (report["method"], report["calibration"]["source"]) == ("lsq", data)
    assert printed.strip().splitlines()[-1], "the model answered nothing"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_methods_compared_in_memory(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, str(EXAMPLES / "compare_methods.py"), "--windows", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["method", "rtn", "hqq", "gptq", "awq"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_cells_of_the_notebook_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, cell in enumerate(cells(), 1):
        exec(compile("".join(cell["source"]), f"quantize.ipynb, cell {number}", "exec"), names)
    assert "bits per weight" in capsys.readouterr().out
    assert (tmp_path / "out" / "gptq").is_dir()


def test_the_notebook_was_saved_after_one_run_from_top_to_bottom() -> None:
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    for cell in cells():
        ast.parse("".join(cell["source"]))
        assert cell["outputs"], "a cell without output"
        assert all(output["output_type"] != "error" for output in cell["outputs"])


def test_every_line_of_the_conversations_is_one() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "chat.jsonl").read_text(encoding="utf-8").splitlines()]
    roles = [[message["role"] for message in row["messages"]] for row in rows]
    assert roles == [["user", "assistant"] * 2] * len(rows)
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
