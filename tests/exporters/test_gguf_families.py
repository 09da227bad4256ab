"""Every architecture in a GGUF file: its tensors and metadata, and the same logits in llama.cpp and transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from exporters.test_witnesses import logits_of_llama_cpp
from helpers import gguf_families
from helpers.gguf_families import CASES
from helpers.native_checkpoints import exported, plain
from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint
from qtool.exporters.gguf import families
from qtool.exporters.gguf.layout import row_order
from qtool.quant.affine import dequantize

gguf = pytest.importorskip("gguf")
ACTIVATIONS = 0.05  # relative error of logits where llama.cpp rounds inputs of linears to 8 bits
FLOATS = 2e-3  # relative error of logits in float32: sums in another order, and GELU from a table of float16


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
    assert relative(folder, logits_of_llama_cpp(out)) < ACTIVATIONS
    assert relative(folder, logits_of_llama_cpp(out, "--float32")) < FLOATS
