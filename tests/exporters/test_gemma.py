"""``gemma``: transformers loads the folder without another package, and computes the same logits bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import families, tiny
from helpers.native_checkpoints import GRIDS, Q_PROJ, Natives, exported, plain, read_back
from helpers.packed import WEIGHTS, Weight
from transformers import Gemma3ForCausalLM

from qtool.checkpoints.files import write_json
from qtool.config.quant import QuantConfig
from qtool.exporters import gemma
from qtool.models.folders import read_config
from qtool.system.errors import InputError

ROWS = [grid for grid in GRIDS if "pc" in grid and "asym" not in grid]
MIX: dict[str, Any] = {
    "num_bits": 4,
    "group_size": -1,
    "overrides": {"*.down_proj": {"num_bits": 8}, "*.v_proj": {"num_bits": 2}, "*.1.mlp.up_proj": {"skip": True}},
}
TABLES: dict[str, dict[str, Any]] = {
    "head": {"head": {"num_bits": 4}},
    "embedding": {"embedding": {"num_bits": 8}, "head": "float"},
    "both": {"embedding": {"num_bits": 2}, "head": {"num_bits": 3}},
}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


@WEIGHTS
def test_the_layout_gives_the_same_weight_back(weight: Weight) -> None:
    spec = weight.quantized.spec
    if not spec.symmetric or weight.quantized.scale.shape[1] != 1:
        return
    codes, scale = gemma.packed(weight.quantized)
    bits = {3: 4}.get(spec.num_bits, spec.num_bits)
    assert codes.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert torch.equal(gemma.unpacked(codes, scale, bits, weight.dense.shape[1]), weight.dense)


@pytest.mark.parametrize("grid", ROWS)
def test_transformers_computes_the_same_logits(grid: str, native: Natives) -> None:
    folder, out = native(grid), native.export("gemma", grid)
    model = plain(out)
    assert type(model.get_submodule(Q_PROJ)).__name__ == "QuantizedLinear"
    assert torch.equal(tiny.logits(model), native.logits[folder])


@pytest.mark.parametrize("tables", TABLES)
def test_transformers_computes_packed_tables(tables: str, tmp_path: Path) -> None:
    quant = QuantConfig.model_validate({"group_size": -1, **TABLES[tables]})
    written = tiny.quantize(tiny.llama(tmp_path / "float"), tmp_path / "q", quant)
    out = exported(tmp_path / "q", "gemma", tmp_path / "out")
    expected = tiny.logits(written.model)
    assert torch.equal(tiny.logits(plain(out)), expected)
    assert torch.equal(read_back(out), expected)


def test_transformers_computes_a_packed_embedding_that_the_model_scales(tmp_path: Path) -> None:
    config = families.make_config("gemma3")
    config.tie_word_embeddings = False
    quant = QuantConfig.model_validate({"group_size": -1, **TABLES["both"]})
    written = tiny.quantize(families.write(config, tmp_path / "float"), tmp_path / "q", quant)
    model = plain(exported(tmp_path / "q", "gemma", tmp_path / "out"))
    assert isinstance(model, Gemma3ForCausalLM)
    assert torch.equal(tiny.logits(model), tiny.logits(written.model))


def test_bits_differ_by_module_and_float_modules_stay(native: Natives, tmp_path: Path) -> None:
    written = tiny.quantize(native.floats("mixed"), tmp_path / "q", QuantConfig.model_validate(MIX))
    out = exported(tmp_path / "q", "gemma", tmp_path / "out")
    section = read_config(out)["quantization_config"]
    assert section["num_bits"] == 4
    assert sorted(each["num_bits"] for each in section["module_quant_configs"].values()) == [2, 8]
    assert sorted(section["modules_to_not_convert"]) == ["lm_head", "model.layers.1.mlp.up_proj"]
    model, expected = plain(out), tiny.logits(written.model)
    assert torch.equal(tiny.logits(model), expected)
    assert torch.equal(read_back(out), expected)
    kept = model.get_submodule("model.layers.1.mlp.up_proj")
    assert type(kept) is torch.nn.Linear


def test_the_config_names_float32_in_which_weights_are_exact(native: Natives, tmp_path: Path) -> None:
    out = native.export("gemma")
    assert read_config(out)["dtype"] == "float32"
    assert tiny.stored(out)["model.embed_tokens.weight"].dtype == torch.bfloat16
    asked = exported(native("w4pc"), "gemma", tmp_path / "out", "bfloat16")
    assert read_config(asked)["dtype"] == "bfloat16"
    assert "unpacks weights in bfloat16, which rounds them" in (asked / "README.md").read_text()


@pytest.mark.parametrize(
    ("quant", "tied", "words"),
    [
        ({"group_size": 32}, False, r"is w4g32, and the gemma quantizer has one scale .*; set group_size: -1"),
        ({"group_size": -1, "symmetric": False}, False, r"is w4pc asym, .* no zero points; set symmetric: true"),
        ({"group_size": -1, "embedding": {"num_bits": 8}}, True, r"lm_head computes with .*quant\.embedding: float"),
        ({"group_size": -1, "head": {"num_bits": 4, "group_size": 32}}, False, r"lm_head is w4g32.*\(quant\.head\)"),
    ],
    ids=str,
)
def test_other_grids_and_tied_tables_are_refused(quant: dict[str, Any], tied: bool, words: str, tmp_path: Path) -> None:
    floats = tiny.llama(tmp_path / "float", tied=tied)
    tiny.quantize(floats, tmp_path / "q", QuantConfig.model_validate(quant))
    with pytest.raises(InputError, match=words):
        exported(tmp_path / "q", "gemma", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_rounds_activations_is_not_read_as_one_that_does_not(native: Natives, tmp_path: Path) -> None:
    out = tiny.copied(native.export("gemma"), tmp_path / "out")
    tiny.change(out, **{f"{Q_PROJ}.input_activation_scale": torch.tensor(0.5)})
    with pytest.raises(InputError, match="rounds activations by input_activation_scale"):
        read_back(out)


def test_bits_that_do_not_fit_the_codes_are_refused(native: Natives, tmp_path: Path) -> None:
    out = tiny.copied(native.export("gemma"), tmp_path / "out")
    config = read_config(out)
    config["quantization_config"]["num_bits"] = 8
    write_json(out / "config.json", config)
    with pytest.raises(InputError, match=r"has torch\.uint8 codes of 8 bits"):
        read_back(out)
