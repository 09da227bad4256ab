"""What tests of whole commands share: a recipe, a run, and what must be left of it."""

import hashlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from qtool.data import hub

NATIVE_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "qtool.json",
    "report.html",
    "report.json",
    "report.md",
    "tokenizer.json",
    "tokenizer_config.json",
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error, without the progress lines before it."""
        assert "\nerror: " in f"\n{self.err}", self.err
        return self.err[f"\n{self.err}".rindex("\nerror: ") :].strip()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data on this machine and no hub, whatever there is."""
    monkeypatch.setenv("QTOOL_DATA_DIR", "")
    monkeypatch.setattr(hub, "hub_answers", lambda: False)


def weights_digest() -> str:
    """One hash for all weights of ``out/q``."""
    files = sorted(Path("out/q").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def write_recipe(models: Path, **sections: Any) -> str:
    """Write ``r.yaml``: round to nearest, and the sections given as keywords; returns its name."""
    base: dict[str, Any] = {
        "model": {"path": str(models / "llama"), "device": "cpu", "dtype": "float32"},
        "method": {"name": "rtn"},
        "quant": {"num_bits": 4, "group_size": 32},
        "output": {"path": "out/q"},
    }
    for key, value in sections.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    Path("r.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    return "r.yaml"


def whole_run(models: Path) -> dict[str, Any]:
    """Sections of a whole run: calibration from a file, evaluation, two exports."""
    return {
        "method": {"name": "gptq"},
        "data": {"source": str(models / "prose.txt"), "num_samples": 8, "seq_len": 32},
        "eval": {"tasks": ["generated", "kl"], "limit": 2, "context": 32},
        "export": [{"format": "gptq", "path": "out/gptq"}, {"format": "dense", "path": "out/dense"}],
        "seed": 3,
    }


def own(folder: Path, to: str = "model") -> Path:
    """A copy of a model, to damage."""
    shutil.copytree(folder, to)
    return Path(to)


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def left() -> list[str]:
    """What is under the output folder, half-written things included."""
    return sorted(str(path) for path in Path("out").rglob("*")) if Path("out").exists() else []


def refused(result: Result, code: int = 2) -> str:
    """The message of a command that failed as it should: in words, short, with nothing left."""
    assert result.code == code, result.err
    message = result.message
    assert "Traceback" not in result.err
    assert "bug in qtool" not in message
    assert len(message.splitlines()) <= 10, message
    assert len(message) < 2000, message
    assert not [path for path in left() if "partial" in path or path.startswith("out/q")]
    return message
