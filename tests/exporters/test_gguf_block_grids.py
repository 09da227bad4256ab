"""``gguf``: grids of GGUF are written in the types of their names, and the ``gguf`` package reads the same weights."""

from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.native_checkpoints import exported, negative, plain
from helpers.weights import make_weight
from transformers import AutoModelForCausalLM

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.grids import BLOCK_GRIDS
from qtool.config.quant import QuantConfig, QuantSpec
from qtool.exporters import _base
from qtool.exporters.gguf import blocks
from qtool.quant.affine import QuantizedWeight, dequantize, quantize
from qtool.quant.ranges import search_qparams
from qtool.system.errors import InputError

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_the_package_dequantizes_the_weights_of_block_grids(name: str) -> None:
    spec = QuantSpec.model_validate({"grid": name})
    spec = QuantSpec.model_validate({"grid": name, "negative_scales": spec.symmetric})  # of q6_k only when asked for
    for seed, magnitude in enumerate([1e-5, 0.02, 3.0]):
        weight = make_weight(8, 768, "normal", magnitude, seed)
        grid = search_qparams(weight, spec, 2.0)
        found = QuantizedWeight(quantize(weight, *grid, spec), *grid, spec)
        assert bool((found.scale < 0).any()) == spec.symmetric
        block = blocks.choose(spec, 768)
        assert block is not None
        assert block.name == name.upper()
        rows = gguf.dequantize(blocks.pack(found, block).numpy(), gguf.GGMLQuantizationType[block.name])
        assert torch.equal(torch.from_numpy(rows), dequantize(*found))


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_a_checkpoint_on_a_block_grid_is_written_and_read_back(name: str, tmp_path: Path) -> None:
    symmetric = QuantSpec.model_validate({"grid": name}).symmetric
    values = {"grid": name, "negative_scales": symmetric, "embedding": {"grid": "q6_k"}}
    tiny.quantize(tiny.BUILTIN, tmp_path / "q", QuantConfig.model_validate(values))
    assert negative(tmp_path / "q") == symmetric
    out = exported(tmp_path / "q", "gguf", tmp_path / "out")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    assert {kinds[f"blk.{i}.{part}.weight"] for i in range(4) for part in ("attn_q", "ffn_down")} == {name.upper()}
    assert kinds["token_embd.weight"] == "Q6_K"
    source, opened = NativeCheckpoint(tmp_path / "q"), _base.get("gguf").open(out)
    for linear in source.specs:
        assert torch.equal(_base.get("gguf").read(opened, linear), dequantize(*source.quantized(linear)))
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.equal(tiny.logits(model), tiny.logits(plain(tmp_path / "q")))
    with pytest.raises(InputError, match=r"is on the grid \w+ of GGUF, which mlx cannot hold; export gguf or dense"):
        exported(tmp_path / "q", "mlx", tmp_path / "mlx")
    exported(tmp_path / "q", "dense", tmp_path / "dense")


@pytest.mark.parametrize(("overrides", "name"), [({}, "Q4_K_S"), ({"*.v_proj": {"grid": "q6_k"}}, "Q4_K_M")])
def test_the_file_type_says_whether_grids_are_mixed(overrides: dict[str, object], name: str, tmp_path: Path) -> None:
    quant = QuantConfig.model_validate({"grid": "q4_k", "overrides": overrides})
    tiny.quantize(tiny.BUILTIN, tmp_path / "q", quant)
    reader = gguf.GGUFReader(exported(tmp_path / "q", "gguf", tmp_path / "out") / "model.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{name}"]
