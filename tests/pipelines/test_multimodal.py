"""Whole commands on multimodal models: the text decoder is quantized, everything else is saved as it was."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import multimodal, tiny
from helpers.multimodal import FAMILIES
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from qtool.cli.main import main
from qtool.config.sections import DataConfig, ModelConfig
from qtool.data import windows
from qtool.models.kept_float import MIN_ROWS
from qtool.models.loading import load_model
from qtool.pipelines.manifest import read_manifest

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("ptq", {}),
    "gptq": ("ptq", {}),
    "awq": ("ptq", {"search_samples": 2}),
    "smoothquant": ("ptq", {}),
    "signround": ("ptq", {"iterations": 2}),
    "efficientqat": ("efficientqat", {"min_steps": 2, "epochs": 0.1, "e2e": {"steps": 2}}),
}
TABLES: dict[str, Any] = {"num_bits": 4, "group_size": 16, "embedding": {"num_bits": 8}}
PROSE = "\n".join(tiny.PROSE * 12)
FAST = ("llava", "qwen2_vl", "qwen3_5", "gemma3_large")


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a float model, made on first use. Only read it."""
    at = tmp_path_factory.mktemp("multimodal")
    return lambda name: at / name if (at / name).exists() else multimodal.write(name, at / name)


def recipe(folder: Path, model: Path, method: str, **sections: Any) -> str:
    (folder / "text.txt").write_text(PROSE)
    content = {
        "model": {"path": str(model), "device": "cpu"},
        "method": {"name": method} | METHODS[method][1],
        "quant": {"num_bits": 4, "group_size": 16},
        "data": {"source": str(folder / "text.txt"), "num_samples": 4, "seq_len": 24},
        "output": {"path": str(folder / "q")},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(content | sections))
    return str(folder / "r.yaml")


@torch.no_grad()
def logits(folder: Path, name: str, auto: Any = AutoModelForImageTextToText) -> Tensor:
    """Return the logits of a prompt with a picture."""
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    result: Tensor = model(**multimodal.prompt(name), use_cache=False).logits
    return result


def runs(floats: Callable[[str], Path], tmp_path: Path, name: str, method: str) -> None:
    source = floats(name)
    assert main([METHODS[method][0], recipe(tmp_path, source, method), "--quiet"]) == 0
    assert main(["export", str(tmp_path / "q"), "--format", "dense", "-o", str(tmp_path / "d"), "--quiet"]) == 0
    native = logits(tmp_path / "q", name)
    assert torch.equal(native, logits(tmp_path / "d", name))
    assert not torch.equal(native, logits(source, name))
    assert native.isfinite().all()
    packed = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["linears"]
    before, after = (
        AutoModelForImageTextToText.from_pretrained(each, dtype="auto") for each in (source, tmp_path / "q")
    )
    blocks = next(key for key, module in before.named_modules() if module is before.get_decoder()) + ".layers."
    linears = {k: m for k, m in before.named_modules() if k.startswith(blocks) and isinstance(m, nn.Linear)}
    assert set(packed) == {key for key, linear in linears.items() if linear.out_features >= MIN_ROWS}
    kept = {key: x for key, x in before.state_dict().items() if not key.startswith(blocks)}
    assert sum(not key.startswith(blocks.removesuffix("layers.")) for key in kept) > 10, "the tower is not among them"
    assert all(torch.equal(x, after.state_dict()[key]) for key, x in kept.items())


@pytest.mark.parametrize("name", FAST)
def test_native_and_dense_say_the_same_of_a_picture(floats: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    runs(floats, tmp_path, name, "gptq")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*FAST, "mllama")])
def test_native_and_dense_of_other_families_say_the_same_of_a_picture(
    floats: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    runs(floats, tmp_path, name, "gptq")


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "gptq"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3_deep"])
def test_every_method_quantizes_the_text_decoder(
    floats: Callable[[str], Path], tmp_path: Path, name: str, method: str
) -> None:
    runs(floats, tmp_path, name, method)


# ------------------------------------------------------------------------------------------ calibration with pictures


def rows_with_pictures(folder: Path) -> Path:
    """Write rows of every kind, and their pictures."""
    rows: list[dict[str, Any]] = []
    for index in range(8):
        Image.effect_noise((40 + index, 30), 50).convert("RGB").save(folder / f"{index}.png")
        encoded = base64.b64encode((folder / f"{index}.png").read_bytes()).decode()
        question = [{"type": "image", "image": f"{index}.png"}, {"type": "text", "text": "What is this?"}]
        rows += [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": tiny.PROSE[0]}]},
            {"image": f"{index}.png", "text": tiny.PROSE[1]},
            {"instruction": "Say something.", "output": tiny.PROSE[2]},
            {"image": f"data:image/png;base64,{encoded}", "text": tiny.PROSE[3]},
        ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("name", ["llava", pytest.param("idefics3", marks=pytest.mark.slow)])
def test_pictures_calibrate(floats: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """They calibrate an untied head too, whose inputs are those of whole windows."""
    data = {"source": str(rows_with_pictures(tmp_path)), "num_samples": 4, "seq_len": 48}
    assert main(["ptq", recipe(tmp_path, floats(name), "gptq", data=data, quant=TABLES), "--quiet"]) == 0
    assert "lm_head.weight_packed" in tiny.stored(tmp_path / "q")
    manifest = read_manifest(tmp_path / "q")
    assert manifest is not None
    assert manifest.data is not None
    loaded = load_model(ModelConfig(path=str(floats(name)), device="cpu"))
    text = windows.calibration(DataConfig.model_validate(data), loaded, 0)
    assert len(text.pictures) == 4
    assert manifest.data.sha256 == windows.token_hash(*text) != windows.token_hash(text.tokens)
    AutoProcessor.from_pretrained(tmp_path / "q")
    assert "model = AutoModelForMultimodalLM.from_pretrained(" in (tmp_path / "q" / "README.md").read_text()


@pytest.mark.parametrize("method", ["efficientqat"])
def test_training_of_the_whole_model_refuses_pictures_in_one_line(
    floats: Callable[[str], Path], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"source": str(rows_with_pictures(tmp_path)), "num_samples": 2, "seq_len": 48}
    assert main([method, recipe(tmp_path, floats("llava"), method, data=data), "--quiet"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "rows.jsonl holds pictures, and efficientqat trains the whole model, which reads text only" in line
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("quant", [{"num_bits": 4, "group_size": 16}, TABLES], ids=["linears", "tables"])
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForMultimodalLM])
@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_other_auto_classes_load_the_checkpoint(
    floats: Callable[[str], Path], tmp_path: Path, name: str, auto: Any, quant: dict[str, Any]
) -> None:
    """AutoModelForCausalLM loads of Qwen3.5 the language model alone, whose linears and tables have other names."""
    assert main(["ptq", recipe(tmp_path, floats(name), "rtn", quant=quant), "--quiet"]) == 0
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "q", dtype=torch.float32)(input_ids=tokens)
        found = auto.from_pretrained(tmp_path / "q", dtype=torch.float32)(input_ids=tokens)
    assert torch.equal(found.logits, whole.logits)


def test_native_and_dense_are_measured_on_text(floats: Callable[[str], Path], tmp_path: Path) -> None:
    assert main(["ptq", recipe(tmp_path, floats("llava"), "rtn"), "--quiet"]) == 0
    assert main(["export", str(tmp_path / "q"), "--format", "dense", "-o", str(tmp_path / "d"), "--quiet"]) == 0
    found = []
    for folder in ("q", "d"):
        options = ["--tasks", "generated", "--limit", "2", "--context", "24", "--float-model", str(floats("llava"))]
        options += ["--dtype", "float32"]  # auto: bfloat16 of the packed checkpoint on processors that multiply it
        out = tmp_path / f"eval-{folder}"
        assert main(["eval", str(tmp_path / folder), *options, "-o", str(out), "--quiet"]) == 0
        (row,) = json.loads((out / "report.json").read_text())["results"]
        found.append((row["value"], row["float_value"]))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
