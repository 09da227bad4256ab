"""No call of transformers in qtool or its scripts runs the code of a model's folder, or asks whether it may."""

import ast
import io
import json
from pathlib import Path

import pytest
from helpers import tiny
from helpers.families import W4

import qtool
from qtool.exporters._folder import skeleton
from qtool.system.errors import InputError

PACKAGE = Path(qtool.__file__).parent
FILES = [*sorted(PACKAGE.rglob("*.py")), *sorted((PACKAGE.parent / "scripts").rglob("*.py"))]

LOADERS = ("from_pretrained", "from_config")


def unguarded(source: str) -> list[int]:
    """Return the lines of calls of a loader of an ``Auto`` class that do not forbid code."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in LOADERS
        and not any(
            key.arg == "trust_remote_code" and isinstance(key.value, ast.Constant) and key.value.value is False
            for key in node.keywords
        )
    ]


@pytest.mark.parametrize("call", ["AutoTokenizer.from_pretrained(x)", "AutoModel.from_config(x, trust_remote_code=y)"])
def test_the_search_finds_a_call_that_may_run_code(call: str) -> None:
    assert unguarded(f"a = 1\nb = {call}") == [2]


def test_an_export_refuses_a_checkpoint_whose_config_names_code_and_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its standard input is not asked either."""
    tiny.quantize(tiny.llama(tmp_path / "m"), tmp_path / "q", W4)
    (tmp_path / "q" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    file = tmp_path / "q" / "config.json"
    changes = {"model_type": "clip_text_model", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(InputError, match=r"transformers makes no model of its config\.json"):
        skeleton(tmp_path / "q")
    assert not (tmp_path / "ran").exists()


def test_no_call_may_run_code() -> None:
    assert len(FILES) > 150
    found = [f"{file}:{line}" for file in FILES for line in unguarded(file.read_text(encoding="utf-8"))]
    assert not found, "add trust_remote_code=False: " + ", ".join(found)
