"""Native checkpoints: the tensors on disk are the quantized ones, and damage is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.weights import same
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from qtool.checkpoints import files
from qtool.checkpoints.native import NativeCheckpoint
from qtool.checkpoints.quantization_config import section_of, specs_of
from qtool.config.quant import BITS, QuantConfig, QuantSpec
from qtool.models.folders import read_config
from qtool.models.linears import packed_linears
from qtool.quant.packed_weight import GRIDS_VERSION
from qtool.system.errors import InputError, RunError

MIXED = QuantConfig.model_validate(
    {
        "num_bits": 3,
        "group_size": 32,
        "symmetric": False,
        "overrides": {
            "*.down_proj": {"num_bits": 8, "group_size": -1},
            "*.k_proj": {"symmetric": True, "scale_dtype": "float32"},
            "*.1.mlp.up_proj": {"skip": True},
        },
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "mixed"
    tiny.quantize(folder, out, MIXED)
    return out


def set_section(folder: Path, **values: object) -> None:
    config = read_config(folder)
    config["quantization_config"] |= values
    files.write_json(folder / "config.json", config)


# reading back


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_saved_checkpoint_holds_the_same_codes_scales_and_zero_points(
    family: str, symmetric: bool, tmp_path: Path
) -> None:
    floats = tiny.FAMILIES[family](tmp_path / "float")
    loaded = tiny.quantize(floats, tmp_path / "out", QuantConfig(num_bits=3, group_size=32, symmetric=symmetric))
    source = NativeCheckpoint(tmp_path / "out")
    layers = packed_linears(loaded.model)
    assert list(source.specs) == list(layers)
    assert len(layers) == {"llama": 14, "gpt2": 8, "opt": 12}[family]
    for name, layer in layers.items():
        assert same(source.quantized(name), layer.quantized), name


def test_every_linear_of_a_mixed_checkpoint_has_its_own_grid(folder: Path, mixed: Path) -> None:
    source = NativeCheckpoint(mixed)
    layers = packed_linears(tiny.packed(folder, MIXED).model)
    assert source.specs == {name: layer.spec for name, layer in layers.items()}
    assert "model.layers.1.mlp.up_proj" not in source.specs
    assert len(set(source.specs.values())) == 3
    for name, layer in layers.items():
        for part, tensor in layer.state_dict().items():
            read = source.tensor(f"{name}.{part}")
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor), f"{name}.{part}"


def test_what_stays_in_floating_point_keeps_its_bits_and_its_dtype(folder: Path, mixed: Path) -> None:
    floats, source = tiny.stored(folder), NativeCheckpoint(mixed)
    kept = set(source.float_names())
    assert kept == set(floats) - {f"{name}.weight" for name in source.specs}
    assert "model.layers.1.mlp.up_proj.weight" in kept
    for name in kept:
        assert source.tensor(name).dtype == floats[name].dtype == torch.bfloat16
        assert torch.equal(source.tensor(name), floats[name]), name


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    tiny.quantize(tiny.llama(tmp_path / "tied", tied=True), tmp_path / "out", QuantConfig(group_size=32))
    names = set(tiny.stored(tmp_path / "out"))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    tiny.quantize(tiny.llama(tmp_path / "untied"), tmp_path / "out2", QuantConfig(group_size=32))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(tiny.stored(tmp_path / "out2"))


def test_a_large_checkpoint_is_sharded_with_an_index(
    folder: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_SHARD_SIZE", 30_000)
    tiny.quantize(folder, tmp_path / "out", MIXED)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert set(index["weight_map"].values()) == {file.name for file in shards}
    whole, sharded = tiny.stored(mixed), tiny.stored(tmp_path / "out")
    assert set(index["weight_map"]) == set(whole) == set(sharded)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)
    source = NativeCheckpoint(tmp_path / "out")
    assert all(
        torch.equal(source.quantized(name).codes, NativeCheckpoint(mixed).quantized(name).codes)
        for name in source.specs
    )


def test_others_may_read_the_files_as_far_as_the_umask_says(folder: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        tiny.quantize(folder, tmp_path / "out", QuantConfig(group_size=32))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}


def test_a_write_that_reads_back_differently_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, file, metadata=metadata)
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)

    monkeypatch.setattr(files, "save_file", failing)
    with pytest.raises(RunError, match=r"read back from .* differs"):
        tiny.quantize(folder, tmp_path / "out", QuantConfig(group_size=32))
    assert not list(tmp_path.iterdir())


# quantization_config in config.json

specs = st.builds(
    QuantSpec,
    num_bits=st.sampled_from(BITS),
    group_size=st.one_of(st.just(-1), st.integers(1, 4096)),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)


@given(st.dictionaries(st.text(min_size=1), specs, min_size=1))
def test_the_section_of_any_mix_of_grids_reads_back_as_it_was(grids: dict[str, QuantSpec]) -> None:
    section = json.loads(json.dumps(section_of(grids)))
    assert specs_of(section) == grids
    assert list(specs_of(section)) == list(grids)
    assert section_of(specs_of(section)) == section


@given(specs, st.integers(1, 5))
def test_one_grid_is_written_once(spec: QuantSpec, count: int) -> None:
    section = section_of({f"layers.{i}.q": spec for i in range(count)})
    assert section["overrides"] == {}
    assert QuantSpec(**{key: section[key] for key in QuantSpec.model_fields if key in section}) == spec


def test_a_newer_format_is_refused_by_its_number(mixed: Path, tmp_path: Path) -> None:
    folder = tiny.copied(mixed, tmp_path / "newer")
    set_section(folder, format_version=GRIDS_VERSION + 1)
    with pytest.raises(
        InputError, match=rf"newer: .*version {GRIDS_VERSION + 1}.*reads up to {GRIDS_VERSION}.*upgrade"
    ):
        NativeCheckpoint(folder)


@pytest.mark.parametrize(
    "damage",
    [
        {"num_bits": 5},
        {"group_size": "many"},
        {"symmetric": None},
        {"linears": None},
        {"linears": 3},
        {"overrides": None},
        {"overrides": []},
        {"overrides": {"model.layers.0.self_attn.q_proj": {"num_bit": 4}}},
        {"overrides": {"model.layers.0.self_attn.q_proj": 4}},
    ],
    ids=str,
)
def test_a_damaged_section_is_refused_with_the_folder_named(
    mixed: Path, tmp_path: Path, damage: dict[str, object]
) -> None:
    folder = tiny.copied(mixed, tmp_path / "damaged")
    set_section(folder, **damage)
    with pytest.raises(InputError, match=r"damaged: quantization_config is damaged"):
        NativeCheckpoint(folder)


@pytest.mark.parametrize("key", ["num_bits", "linears", "overrides", "scale_dtype"])
def test_a_section_that_lacks_a_key_is_refused(mixed: Path, tmp_path: Path, key: str) -> None:
    folder = tiny.copied(mixed, tmp_path / "lacking")
    config = read_config(folder)
    del config["quantization_config"][key]
    files.write_json(folder / "config.json", config)
    with pytest.raises(InputError, match=f"damaged: '{key}'"):
        NativeCheckpoint(folder)


@pytest.mark.parametrize("section", [[], "qtool", 4], ids=repr)
def test_a_section_that_is_no_mapping_is_refused(mixed: Path, tmp_path: Path, section: object) -> None:
    folder = tiny.copied(mixed, tmp_path / "wrong")
    files.write_json(folder / "config.json", read_config(folder) | {"quantization_config": section})
    with pytest.raises(InputError, match="quantization_config"):
        NativeCheckpoint(folder)


def test_a_float_model_and_another_tools_model_are_no_source(folder: Path, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a float model; a qtool checkpoint is needed"):
        NativeCheckpoint(folder)
    other = tiny.copied(mixed, tmp_path / "other")
    set_section(other, quant_method="gptq")
    with pytest.raises(InputError, match="'gptq', not a qtool checkpoint"):
        NativeCheckpoint(other)
    with pytest.raises(InputError, match=r"has no config\.json"):
        NativeCheckpoint(tmp_path)


def test_a_tensor_that_is_missing_or_does_not_fit_its_grid_is_named(mixed: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    folder = tiny.copied(mixed, tmp_path / "shape")
    set_section(folder, num_bits=4)
    with pytest.raises(InputError, match=rf"{name}\.weight_packed is torch\.int32 \[64, 6\]; .* \[64, 8\]"):
        NativeCheckpoint(folder).quantized(name)
    with pytest.raises(InputError, match=r"lacks the tensor model\.layers\.9\.x; the checkpoint is incomplete"):
        NativeCheckpoint(folder).tensor("model.layers.9.x")


def test_a_truncated_file_is_named(mixed: Path, tmp_path: Path) -> None:
    folder = tiny.copied(mixed, tmp_path / "cut")
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        NativeCheckpoint(folder).quantized("model.layers.0.self_attn.q_proj")


def test_a_grid_that_does_not_exist_cannot_be_described() -> None:
    with pytest.raises(ValidationError):
        QuantSpec(num_bits=5)


def test_every_file_says_that_it_holds_torch_tensors(mixed: Path) -> None:
    with safe_open(mixed / "model.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}
