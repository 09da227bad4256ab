"""Whole commands on multimodal models: the text decoder is quantized, everything else is saved as it was."""

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import multimodal
from helpers.multimodal import FAMILIES
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from qtool.cli.main import main
from qtool.data import pictures, windows
from qtool.pipelines.manifest import read_manifest

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("ptq", {}),
    "gptq": ("ptq", {}),
    "awq": ("ptq", {"search_samples": 2}),
    "signround": ("ptq", {"iterations": 2}),
    "efficientqat": ("efficientqat", {"min_steps": 2, "epochs": 0.1, "e2e": {"steps": 2}}),
}
PROSE = "\n".join(multimodal.tiny.PROSE * 12)
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
    assert set(packed) == {k for k, m in before.named_modules() if k.startswith(blocks) and isinstance(m, nn.Linear)}
    kept = {key: x for key, x in before.state_dict().items() if not key.startswith(blocks)}
    assert sum(not key.startswith(blocks.removesuffix("layers.")) for key in kept) > 10, "the tower is not among them"
    assert all(torch.equal(x, after.state_dict()[key]) for key, x in kept.items())


@pytest.mark.parametrize("name", FAST)
def test_native_and_dense_say_the_same_of_a_picture(floats: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    runs(floats, tmp_path, name, "gptq")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FAST])
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
