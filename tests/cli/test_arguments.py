"""Paths on the command line mean what they mean in recipes, and what is no path is a usage error."""

import json
from pathlib import Path

import pytest
from helpers import tiny

from qtool.cli import main
from qtool.config.quant import QuantConfig

BAD = ("~nosuchuser/x", "$UNSET_HERE/x", "x" * 300)
COMMANDS = [
    ["verify", "{}"],
    ["reproduce", "{}"],
    ["bench", "{}"],
    ["compare", "{}"],
    ["export", "{}", "-f", "dense", "-o", "x"],
    ["export", "x", "-f", "dense", "-o", "{}"],
    ["eval", "{}"],
    ["eval", "builtin:wiki-llama-3m", "-o", "{}"],
    ["eval", "builtin:wiki-llama-3m", "--tasks", "generated", "--limit", "1", "--context", "8", "--float-model", "{}"],
    ["compare", "x", "-o", "{}"],
    ["plan", "quickstart", "-o", "{}"],
    ["ptq", "{}"],
    ["sweep", "{}"],
    ["sweep", "tables/builtin-corners", "-o", "{}"],
]


@pytest.mark.parametrize("path", BAD, ids=["user", "variable", "long"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_is_no_path_is_refused_by_every_command(
    command: list[str], path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([each.format(path) for each in command]) == 2
    said = capsys.readouterr().err
    assert any(words in said for words in ("no user nosuchuser", "UNSET_HERE is not set", "File name too long"))


def test_a_path_below_a_variable_is_found(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.quantize(llama_folder, tmp_path / "q", QuantConfig(group_size=32))
    monkeypatch.setenv("MODELS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main.main(["export", "$MODELS/q", "-f", "dense", "-o", "~/dense", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "dense")
    assert (tmp_path / "dense" / "config.json").is_file()


@pytest.mark.parametrize("size", ["9" * 5000, "99999999999999999999", "0", "x", "-1"])
def test_a_batch_size_of_any_text_is_a_number_or_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["eval", "builtin:wiki-llama-3m", "--tasks", "generated", "--batch-size", size]) == 2
    assert "eval.batch_size: " in capsys.readouterr().err
