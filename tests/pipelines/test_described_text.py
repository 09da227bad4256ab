"""What a run says of its conversations: how they were written, and how many of their tokens are learned."""

import json
import re
from pathlib import Path

import pytest
from helpers import tiny

from qtool.cli import main
from qtool.data import conversations
from qtool.pipelines.manifest import read_manifest

ROWS = [{"instruction": f"Say {index}.", "output": f"{index}, and {index} again."} for index in range(40)]


def test_the_rendering_and_the_learned_tokens_are_in_the_notes_and_the_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    out = str(tmp_path / "out")
    keys = {"data.source": file, "data.num_samples": 4, "data.seq_len": 64}
    changes = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    asked = ["quantize", "builtin:wiki-llama-3m", "--method", "gptq", "--group-size", "64", "-o", out, *changes]
    assert main.main(asked) == 0
    said = re.findall(r"note: data: .*", capsys.readouterr().err)
    assert len(said) == 1
    text = json.loads(Path(out, "report.json").read_text(encoding="utf-8"))["calibration"]
    assert 0 < text["num_learned"] < 4 * 64
    assert f"{text['num_learned']} of 256 tokens count in the loss of a training" in said[0]
    assert "written by qtool's plain format (### User:, ### Assistant:)" in said[0]
    assert said[0].removeprefix("note: data: ") in Path(out, "report.md").read_text(encoding="utf-8")
    assert main.main(["eval", out, "--tasks", "generated", "--limit", "1", "--context", "32", "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["calibration"] == text
    manifest = read_manifest(Path(out))
    assert manifest is not None
    assert manifest.data is not None
    assert manifest.data.num_learned == text["num_learned"]


def test_a_chat_template_is_named_by_its_hash() -> None:
    tokenizer = tiny.with_builtin_tokenizer(0, 64).tokenizer
    names = set()
    for template in ("{{ messages }}", "{{ messages }}.", "{{ messages }}"):
        tokenizer.chat_template = template
        names.add(conversations.rendering(tokenizer))
    assert len(names) == 2
    assert all(re.fullmatch(r"the tokenizer's chat template \(SHA-256 [0-9a-f]{12}\.\.\.\)", name) for name in names)
