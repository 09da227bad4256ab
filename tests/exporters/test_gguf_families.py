"""Every architecture in a GGUF file: its tensors and metadata, and the same logits in llama.cpp and transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exporters.test_witnesses import logits_of_llama_cpp
from helpers import gguf_families, tiny, vocabularies
from helpers.gguf_families import CASES
from helpers.native_checkpoints import GRIDS, exported, plain
from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint
from qtool.exporters.gguf import families
from qtool.exporters.gguf.layout import row_order
from qtool.quant.affine import dequantize

gguf = pytest.importorskip("gguf")
ACTIVATIONS = 0.05  # relative error of logits where llama.cpp rounds inputs of linears to 8 bits
MORE = 0.15  # the same, where a token may get another expert, or a state adds up errors
FLOATS = 1e-5  # relative error of logits in float32: sums in another order
GELU = 2e-3  # the same, where llama.cpp takes GELU from a table of float16


def stored(out: Path) -> dict[str, Tensor]:
    """Return the tensors of a file in float32, by the names that it has."""
    tensors = gguf.GGUFReader(out / "model.gguf").tensors
    return {each.name: torch.from_numpy(np.array(gguf.dequantize(each.data, each.tensor_type))) for each in tensors}


def test_every_family_has_a_case() -> None:
    types = {gguf_families.architectures.architectures()[case.row].model_type for case in CASES.values()}
    assert types == families.FAMILIES.keys()


def relative(folder: Path, witness: dict[str, Tensor]) -> float:
    """Return the error of a witness's logits, relative to ours, as a ratio of norms."""
    with torch.no_grad():
        ours = plain(folder)(witness["tokens"]).logits
    return float((witness["logits"] - ours).norm() / ours.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    folder = gguf_families.quantized(name, tmp_path)
    out = exported(folder, "gguf", tmp_path / "out")
    tolerance = MORE if "moe" in name or name == "mixtral" or name.startswith("qwen3_5") else ACTIVATIONS
    assert relative(folder, logits_of_llama_cpp(out)) < tolerance
    kind = gguf_families.architectures.architectures()[CASES[name].row].model_type
    tolerance = GELU if families.FAMILIES[kind].activation.startswith("gelu") else FLOATS
    assert relative(folder, logits_of_llama_cpp(out, "--float32")) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_llama_cpp_reads_texts_as_the_same_tokens(kind: str, tmp_path: Path) -> None:
    floats = tiny.copied(tiny.BUILTIN, tmp_path / "float")
    ours = vocabularies.save(kind, floats)
    tiny.quantize(floats, tmp_path / "q", GRIDS["w4g32"])
    out = exported(tmp_path / "q", "gguf", tmp_path / "out")
    (tmp_path / "texts.json").write_text(json.dumps(vocabularies.TEXTS))
    witness = logits_of_llama_cpp(out, "--texts", str(tmp_path / "texts.json"))
    for index, text in enumerate(vocabularies.TEXTS):
        assert witness[f"text_{index}"].tolist() == ours(text)["input_ids"], text
