"""Packed embeddings and heads in exports: the same tables and logits, or refused with the reason and a way out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import architectures, tiny
from helpers.native_checkpoints import exported, plain, read_back
from helpers.packed_heads import CASES, EMBEDDINGS, GRID, HEADS, ROWS, Tables
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantConfig
from qtool.config.sections import ExportConfig
from qtool.exporters import _base, compressed_tensors
from qtool.models import tables as selection
from qtool.models.folders import read_config
from qtool.quant.affine import dequantize
from qtool.system.errors import InputError, RunError

TABLE, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return Tables(tmp_path_factory.mktemp("tables"))


def section(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_config(out)["quantization_config"]
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gptq-v2", "auto-round", "dense"])
def test_every_table_is_read_back_or_refused_with_the_reason(
    name: str, case: str, tables: Tables, tmp_path: Path
) -> None:
    folder = tables(case)
    source, exporter = NativeCheckpoint(folder), _base.get(name)
    if case in EMBEDDINGS and name not in ("compressed-tensors", "dense"):
        reader = "auto-round 0.16 reads no packed" if name == "auto-round" else "GPTQModel 7.7 reads embeddings with"
        tied = rf" \({HEAD} computes with the same table\)" if case.startswith("tied") else ""
        with pytest.raises(
            InputError, match=f"{TABLE}{tied} is quantized, and {reader}.*quant.embedding: float, or ex"
        ):
            exported(folder, name, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    out = tables.export(name, case)
    opened = exporter.open(out)
    for weight in source.specs:
        assert torch.equal(exporter.read(opened, weight), dequantize(*source.quantized(weight))), weight
    if name == "dense":
        assert torch.equal(tiny.logits(plain(out)), tables.logits[case])
    else:
        assert exporter.recognises(out) or name == "gptq-v2"
        assert torch.equal(read_back(out), tables.logits[case])


# compressed-tensors


@pytest.mark.parametrize("case", [case for case in CASES if case != "head asym"])
def test_transformers_computes_the_same_logits_from_compressed_tensors(case: str, tables: Tables) -> None:
    pytest.importorskip("compressed_tensors")
    model = plain(tables.export("compressed-tensors", case))
    assert torch.equal(tiny.logits(model), tables.logits[case])


def test_a_tied_table_is_stored_once_as_bytes_with_two_scales(tables: Tables) -> None:
    out = tables.export("compressed-tensors", "tied w4g64 asym")
    source, tensors = NativeCheckpoint(tables("tied w4g64 asym")), tiny.stored(out)
    codes, scale, zero_point, _ = source.quantized(TABLE)
    own = {key: each for key, each in tensors.items() if key.startswith((TABLE, HEAD))}
    parts = {f"{at}.{part}" for at in (TABLE, HEAD) for part in ("weight_scale", "weight_zero_point")}
    assert own.keys() == parts | {f"{TABLE}.weight"}
    assert torch.equal(own[f"{TABLE}.weight"].int() + 8, codes.int())
    for at in (TABLE, HEAD):
        assert torch.equal(own[f"{at}.weight_scale"].float(), scale)
        assert torch.equal(own[f"{at}.weight_zero_point"].int() + 8, zero_point.int())
    rows, columns = codes.shape
    assert sum(each.nbytes for each in own.values()) == rows * columns + 2 * (2 + 1) * rows * columns // 64
    assert {own[f"{TABLE}.{part}"].dtype for part in ("weight", "weight_zero_point")} == {torch.int8}
    card = (out / "README.md").read_text()
    assert "embeddings take 8.38 bits per weight" in card  # 8 for each code, 16 and 8 for each group of 64
    assert "never load this with dequantize=True" in card
    groups = section(out)["config_groups"]
    assert [(group["targets"], group["format"]) for group in groups.values()] == [
        (["Embedding", HEAD], "int-quantized"),
        (["Linear"], "pack-quantized"),
    ]
    assert section(out)["format"] == "mixed-precision"
    assert section(out)["ignore"] == []


def test_an_untied_head_is_packed_and_in_the_group_of_its_grid(tables: Tables) -> None:
    out = tables.export("compressed-tensors", "embedding w4g64, head w8")
    assert [group["targets"][:2] for group in section(out)["config_groups"].values()][::2] == [["Embedding"], [HEAD]]
    assert {key for key in tiny.stored(out) if key.startswith(HEAD)} == {
        f"{HEAD}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")
    }
    assert section(tables.export("compressed-tensors", "embedding only"))["ignore"] == [HEAD]


def test_embeddings_that_stay_float_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    tiny.opt(tmp_path / "float")
    monkeypatch.setattr(selection, "MIN_ROWS", 200)  # more than positions, fewer than tokens
    model = tiny.quantize(tmp_path / "float", tmp_path / "q", QuantConfig.model_validate({**GRID, "embedding": ROWS}))
    out = exported(tmp_path / "q", "compressed-tensors", tmp_path / "out")
    assert section(out)["ignore"] == ["model.decoder.embed_positions"]
    assert torch.equal(tiny.logits(plain(out)), tiny.logits(model.model))


def test_an_embedding_that_is_called_with_more_than_rows_is_refused(tmp_path: Path) -> None:
    tiny.opt(tmp_path / "float")
    tiny.quantize(tmp_path / "float", tmp_path / "q", QuantConfig.model_validate({**GRID, "embedding": ROWS}))
    with pytest.raises(InputError, match=r"embed_positions is quantized .*OPTLearnedPositionalEmbedding needs more"):
        exported(tmp_path / "q", "compressed-tensors", tmp_path / "out")


def test_asymmetric_linears_beside_an_embedding_are_refused(tmp_path: Path) -> None:
    quant = QuantConfig.model_validate({**GRID, "symmetric": False, "embedding": ROWS})
    tiny.quantize(tiny.llama(tmp_path / "float", tied=True), tmp_path / "q", quant)
    with pytest.raises(InputError, match=r"q_proj has an asymmetric grid, .* that cannot read model.embed_tokens"):
        exported(tmp_path / "q", "compressed-tensors", tmp_path / "out")


def test_an_asymmetric_head_alone_is_said_to_be_for_vllm(tables: Tables) -> None:
    assert (
        "does not load this folder, which is for vLLM"
        in (tables.export("compressed-tensors", "head asym") / "README.md").read_text()
    )


def test_experts_are_not_read_by_the_grid_of_an_embedding(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    floats = architectures.write("qwen3_moe", tmp_path / "float")
    quant = QuantConfig.model_validate({**GRID, "embedding": ROWS, "head": "float"})  # one grid of linears
    made = tiny.quantize(floats, tmp_path / "q", quant)
    out = exported(tmp_path / "q", "compressed-tensors", tmp_path / "out")
    ours, theirs = tiny.logits(made.model), tiny.logits(plain(out))
    assert float((ours - theirs).detach().abs().max() / ours.abs().max()) < 2e-3  # experts are expanded in float16


def test_inputs_are_rounded_beside_an_embedding(tmp_path: Path) -> None:
    activations = {"num_bits": 8, "symmetric": True}
    quant = QuantConfig.model_validate({**ROWS, "activations": activations, "embedding": ROWS})
    made = tiny.quantize(tiny.llama(tmp_path / "float", tied=True), tmp_path / "q", quant)
    out = exported(tmp_path / "q", "compressed-tensors", tmp_path / "out")
    assert torch.equal(read_back(out), tiny.logits(made.model))
    groups = section(out)["config_groups"].values()
    assert [group["input_activations"] is None for group in groups] == [True, False]
    assert section(out)["format"] == "int-quantized"


def scale_up(scale: Tensor) -> Tensor:
    scale[3] *= 2
    return scale


@pytest.mark.parametrize(
    ("name", "change"), [(f"{HEAD}.weight_scale", scale_up), (f"{HEAD}.weight_scale", None), (f"{TABLE}.weight", None)]
)
def test_a_damaged_table_is_never_kept(
    name: str, change: Any, tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compressed_tensors.EXPORTER

    def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
        notes = original.write(source, out, config)
        tensors = load_file(out / "model.safetensors")
        if change is None and name.startswith(HEAD):
            del tensors[name]
        else:
            tensors[name] = (change or torch.negative)(tensors[name])
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return notes

    folder = tables("tied w8")
    monkeypatch.setattr(compressed_tensors, "EXPORTER", original._replace(write=write))
    with pytest.raises((InputError, RunError), match=r"needs its config group and a copy|embed_tokens differs"):
        exported(folder, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# gptq and auto-round


def test_gptq_names_a_head_for_each_of_its_readers(tables: Tables) -> None:
    """GPTQModel reads ``lm_head`` and ``dynamic``; transformers finds a head only if its search begins at the root."""
    own, same = (section(tables.export("gptq", case)) for case in ("head w8", "head as linears"))
    for found in (own, same):
        assert (found["lm_head"], found["block_name_to_quantize"]) == (True, "")
        assert found["modules_in_block_to_quantize"][0][-1] == HEAD
        assert "self_attn.q_proj" in found["modules_in_block_to_quantize"][0]
    assert own["dynamic"] == {"+:^lm_head$": {"bits": 8, "group_size": -1, "sym": True}}
    assert "dynamic" not in same
    cards = [(tables.export("gptq", case) / "README.md").read_text() for case in ("head w8", "head as linears")]
    assert ["transformers stops, because it reads one grid" in card for card in cards] == [True, False]
    skipped = section(tables.export("gptq", "head w3, linears skipped"))
    assert list(skipped["dynamic"]) == [r"-:.*\.mlp\.up_proj$", "+:^lm_head$"]
    assert section(tables.export("gptq", "head asym"))["checkpoint_format"] == "gptq_v2"


def test_a_head_that_is_listed_first_changes_nothing(tables: Tables, tmp_path: Path) -> None:
    folder = tiny.copied(tables("head w8"), tmp_path / "q")
    config = read_config(folder)
    linears = config["quantization_config"]["linears"]
    linears.insert(0, linears.pop(linears.index(HEAD)))
    write_json(folder / "config.json", config)
    for name in ("gptq", "auto-round"):
        assert section(exported(folder, name, tmp_path / name)) == section(tables.export(name, "head w8"))


@pytest.mark.parametrize("case", HEADS)
def test_auto_round_lists_a_head_whatever_its_grid(case: str, tables: Tables) -> None:
    source, found = NativeCheckpoint(tables(case)), section(tables.export("auto-round", case))
    spec = source.specs[HEAD]
    assert found["extra_config"][HEAD] == {"bits": spec.num_bits, "group_size": spec.group_size, "sym": spec.symmetric}
    assert (found["bits"], found["group_size"], found["sym"]) == (4, 32, True)
