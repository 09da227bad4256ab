"""An export holds exactly what the checkpoint holds, or is refused with the reason; a damaged one is never kept.

Every format goes through the same contract. Then other software reads it: plain transformers for ``dense``,
compressed-tensors for its own format; the others need environments of their own and are slow (``test_witnesses``).
"""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.native_checkpoints import FLOAT32_SCALES, GRIDS, MIXED, Q_PROJ, Natives, exported, plain, read_back

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config import catalog
from qtool.config.quant import BITS, QuantConfig
from qtool.config.sections import ExportConfig
from qtool.exporters import _base
from qtool.models.folders import read_config
from qtool.quant.affine import dequantize
from qtool.system.errors import InputError


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


def same_floats(name: str, folder: Path, out: Path) -> bool:
    source, opened = NativeCheckpoint(folder), _base.get(name).open(out)
    return all(torch.equal(opened.tensor(each).float(), source.tensor(each).float()) for each in source.float_names())


def refused(name: str, grid: str) -> bool:
    """True if a format cannot hold a grid.

    GPTQ holds only one grid, GGUF no 8 bits with a zero point, AWQ no 8 bits, and gemma symmetric rows only.
    """
    if name == "gguf":
        return grid in ("w8pc-asym", "w8g32-asym", "mixed-asym")
    if name == "awq":
        return grid.startswith(("w8", "mixed"))
    if name == "gemma":
        return "pc" not in grid or "asym" in grid
    return name.startswith("gptq") and grid in MIXED


# the contract


def test_the_formats_are_the_files() -> None:
    engines = ("auto-round", "awq", "compressed-tensors", "dense", "gemma", "gguf", "gptq", "gptq-v2", "mlx", "onnx")
    assert catalog.export_formats() == engines
    for name in catalog.export_formats():
        assert len(_base.get(name).summary) > 10


@pytest.mark.parametrize("name", catalog.export_formats())
@pytest.mark.parametrize("grid", [*GRIDS, *MIXED])
def test_an_export_holds_the_same_weights_or_is_refused_with_the_reason(
    name: str, grid: str, native: Natives, tmp_path: Path
) -> None:
    folder, out = native(grid), tmp_path / "out"
    source, exporter = NativeCheckpoint(folder), _base.get(name)
    reason = exporter.refuses(source, ExportConfig(format=name, path=out))
    assert (reason is not None) == refused(name, grid), reason
    if reason is not None:
        with pytest.raises(InputError) as error:
            exported(folder, name, out)
        assert str(error.value) == f"{folder} cannot be exported as {name}: {reason}"
        assert not list(tmp_path.iterdir())
        return
    out = native.export(name, grid)
    assert f"{out.name}.partial" not in [each.name for each in out.parent.iterdir()]
    opened = exporter.open(out)
    for linear in source.specs:
        assert torch.equal(exporter.read(opened, linear), dequantize(*source.quantized(linear))), linear
    assert same_floats(name, folder, out)
    if name != "dense" and ("pc" not in grid or name == "gemma"):
        assert torch.equal(read_back(out), native.logits[folder])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("name", catalog.export_formats())
def test_biases_and_transposed_linears_are_exported_or_refused(
    name: str, family: str, native: Natives, tmp_path: Path
) -> None:
    folder, out = native("w4pc" if name == "gemma" else "w4g32-asym", family), tmp_path / "out"
    if (family, name) != ("gpt2", "gguf") and name != "dense" and (family == "gpt2" or name in ("gguf", "onnx")):
        with pytest.raises(InputError, match=r"(is a Conv1D|its model_type is (gpt2|opt)), .*; export dense"):
            exported(folder, name, out)
        assert not out.exists()
        return
    exported(folder, name, out)
    assert same_floats(name, folder, out)
    logits = tiny.logits(plain(out)) if name == "dense" else read_back(out)
    assert torch.equal(logits, native.logits[folder])


@pytest.mark.parametrize("name", catalog.export_formats())
def test_an_export_has_all_that_a_model_folder_needs(name: str, native: Natives) -> None:
    folder, out = native.plain(name), native.export(name)
    files = {file.name for file in out.iterdir()}
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    weights = {"gguf": {"model.gguf"}, "onnx": {"model.onnx", "model.onnx.data", "genai_config.json"}}
    own = weights.get(name, {"model.safetensors"}) | ({"quantize_config.json"} if "gptq" in name else set())
    assert files == kept | own | {"README.md", "qtool_export.json"}
    config, ours = read_config(out), read_config(folder)
    section = config.pop("quantization_config", None)
    assert (section is None) == (name in ("dense", "gguf", "onnx"))
    assert config.pop("quantization", None) == (section if name == "mlx" else None)
    assert "qtool" not in json.dumps(config)
    assert config["torch_dtype"] == config["dtype"]
    dtypes = ("dtype", "torch_dtype")
    assert {key: value for key, value in config.items() if key not in dtypes} == {
        key: value for key, value in ours.items() if key not in (*dtypes, "quantization_config")
    }
    card = (out / "README.md").read_text()
    assert f"as {name}" in card
    assert "largest weight difference 0, largest logit difference 0 of" in card or name == "dense"
    assert not (out.stat().st_mode ^ folder.stat().st_mode)


def test_an_export_of_tied_embeddings_stores_them_once(tmp_path: Path) -> None:
    tiny.quantize(tiny.llama(tmp_path / "float", tied=True), tmp_path / "q", QuantConfig(group_size=32))
    tiny.quantize(tmp_path / "float", tmp_path / "rows", QuantConfig(group_size=-1))
    for name in catalog.export_formats():
        out = exported(tmp_path / ("rows" if name == "gemma" else "q"), name, tmp_path / name)
        stored = _base.get(name).open(out).names()
        assert "model.embed_tokens.weight" in stored
        assert "lm_head.weight" not in stored
        assert read_config(out)["tie_word_embeddings"] is True
    assert torch.equal(tiny.logits(plain(tmp_path / "dense")), tiny.logits(plain(tmp_path / "q")))


@pytest.mark.parametrize("name", catalog.export_formats())
def test_a_norm_that_a_method_left_in_float32_is_exported_as_it_is(name: str, native: Natives, tmp_path: Path) -> None:
    folder = tiny.copied(native.plain(name), tmp_path / "q")
    norm = "model.layers.0.input_layernorm.weight"
    tiny.change(folder, **{norm: tiny.stored(folder)[norm].float() + 2.0**-16})
    out = exported(folder, name, tmp_path / "out")
    assert same_floats(name, folder, out)


def test_a_sharded_checkpoint_exports_as_well(native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.checkpoints.files.MAX_SHARD_SIZE", 30_000)
    tiny.quantize(native.floats("mixed"), tmp_path / "q", MIXED["mixed"])
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 3
    out = exported(tmp_path / "q", "compressed-tensors", tmp_path / "ct")
    assert len(list(out.glob("*.safetensors"))) > 3
    assert torch.equal(read_back(out), native.logits[native("mixed")])


# dense


@pytest.mark.parametrize("grid", ["w2pc", "w3g32-asym", "w8g32", "mixed-asym", "skipped"])
def test_dense_loads_in_plain_transformers_with_equal_logits(grid: str, native: Natives) -> None:
    folder = native(grid)
    model = plain(native.export("dense", grid))
    assert type(model.get_submodule(Q_PROJ)) is torch.nn.Linear
    assert torch.equal(tiny.logits(model), native.logits[folder])


def test_dense_takes_the_checkpoints_own_dtype_only_where_nothing_is_lost(native: Natives, tmp_path: Path) -> None:
    out = native.export("dense")
    # a 4-bit code times an 11-bit scale (float16) needs more than bfloat16's 8 bits
    assert read_config(out)["dtype"] == "float32"
    tiny.quantize(
        native.floats(), tmp_path / "q", QuantConfig(num_bits=2, group_size=32, scale_dtype="bfloat16")
    )  # -2, -1, 0 and 1 times a bfloat16 number are bfloat16 numbers
    out = exported(tmp_path / "q", "dense", tmp_path / "two")
    assert read_config(out)["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in tiny.stored(out).values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dense_in_a_dtype_that_was_asked_for_says_how_much_it_rounds(
    dtype: str, native: Natives, tmp_path: Path
) -> None:
    folder = native("w8g32")
    out = exported(folder, "dense", tmp_path / "out", dtype)
    source, tensors = NativeCheckpoint(folder), tiny.stored(out)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert read_config(out)["dtype"] == dtype
    exact = {f"{name}.weight": dequantize(*source.quantized(name)) for name in source.specs}
    exact |= {name: source.tensor(name).float() for name in source.float_names()}
    assert tensors.keys() == exact.keys()
    assert all(torch.equal(tensors[name], tensor.to(getattr(torch, dtype))) for name, tensor in exact.items())
    changes = [(tensors[name].float() - tensor).abs().amax() / tensor.abs().amax() for name, tensor in exact.items()]
    worst = max(float(change.max()) for change in changes)
    card = (out / "README.md").read_text()
    said = float(card.split("rounded by up to ")[1].split(" ")[0])
    assert said == pytest.approx(worst, rel=0.05)
    assert said > 2**-12
    assert "largest weight difference 0," not in card


def test_dense_in_float32_rounds_nothing_and_says_nothing(native: Natives, tmp_path: Path) -> None:
    card = (exported(native(), "dense", tmp_path / "out", "float32") / "README.md").read_text()
    assert "rounded" not in card
    assert "largest weight difference 0, largest logit difference 0 of" in card


# gptq


@pytest.mark.parametrize("grid", GRIDS)
def test_gptq_tensors_are_ours_transposed(grid: str, native: Natives) -> None:
    folder, spec = native(grid), GRIDS[grid]
    ours, theirs = tiny.stored(folder), tiny.stored(native.export("gptq", grid))
    for name in NativeCheckpoint(folder).specs:
        rows, columns = ours[f"{name}.weight_shape"].tolist()
        groups = spec.num_groups(columns)
        assert theirs[f"{name}.qweight"].shape == (columns * spec.num_bits // 32, rows)
        assert theirs[f"{name}.qzeros"].shape == (groups, rows * spec.num_bits // 32)
        assert torch.equal(theirs[f"{name}.qweight"], ours[f"{name}.weight_packed"].T)
        assert torch.equal(theirs[f"{name}.scales"], ours[f"{name}.weight_scale"].T)
        assert theirs[f"{name}.scales"].dtype == torch.float16
        assert torch.equal(theirs[f"{name}.g_idx"], torch.arange(columns, dtype=torch.int32) // (columns // groups))
        if not spec.symmetric:
            assert torch.equal(theirs[f"{name}.qzeros"], ours[f"{name}.weight_zero_point"].T)
        assert f"{name}.weight" not in theirs


@pytest.mark.parametrize("grid", GRIDS)
def test_gptq_is_version_1_only_when_symmetric_and_then_no_zero_point_is_0(
    grid: str, native: Natives, tmp_path: Path
) -> None:
    spec = GRIDS[grid]
    for name in ("gptq", "gptq-v2"):
        out = native.export(name, grid)
        section = read_config(out)["quantization_config"]
        version = 1 if spec.symmetric and name == "gptq" else 2
        assert section == json.loads((out / "quantize_config.json").read_text())
        assert section["checkpoint_format"] == section["format"] == ("gptq" if version == 1 else "gptq_v2")
        assert (section["bits"], section["group_size"]) == (spec.num_bits, spec.group_size)
        assert (section["sym"], section["desc_act"], section["lm_head"]) == (spec.symmetric, False, False)
        if spec.symmetric:
            stored = 2 ** (spec.num_bits - 1) - (1 if version == 1 else 0)
            assert stored > 0
            word = sum(stored << (i * spec.num_bits) for i in range(32)) & 0xFFFFFFFF
            zeros = tiny.stored(out)[f"{Q_PROJ}.qzeros"]
            assert (int(zeros[0, 0]) & 0xFFFFFFFF) == word


def test_a_zero_point_of_0_survives_in_version_2(tmp_path: Path, native: Natives) -> None:
    floats = tiny.load(native.floats())
    weight = floats.model.get_parameter(f"{Q_PROJ}.weight")
    weight.copy_(weight.abs() + 0.01)  # nothing below zero: the grid begins at code 0
    floats.model.bfloat16().save_pretrained(tmp_path / "float")
    floats.tokenizer.save_pretrained(tmp_path / "float")
    for bits in BITS:
        folder = tmp_path / f"q{bits}"
        written = tiny.quantize(tmp_path / "float", folder, QuantConfig(num_bits=bits, group_size=32, symmetric=False))
        assert not NativeCheckpoint(folder).quantized(Q_PROJ).zero_point.any()
        out = exported(folder, "gptq", tmp_path / f"out{bits}")
        assert not tiny.stored(out)[f"{Q_PROJ}.qzeros"].any()
        assert torch.equal(read_back(out), tiny.logits(written.model))


def test_gptq_refuses_mixed_grids_and_linears_left_in_float(native: Natives, tmp_path: Path) -> None:
    for grid, words in {
        "mixed": r"4 different grids, .*; export auto-round or compressed",
        "skipped": r"layers\.1\.mlp\.up_proj is left in floating point, .*; export auto-round or compressed",
    }.items():
        for name in ("gptq", "gptq-v2"):
            with pytest.raises(InputError, match=words):
                exported(native(grid), name, tmp_path / "out")


def test_gptq_refuses_shapes_that_its_readers_cannot_hold(tmp_path: Path) -> None:
    tiny.quantize(tiny.llama(tmp_path / "float", intermediate=80), tmp_path / "q", QuantConfig(group_size=16))
    with pytest.raises(InputError, match=r"mlp\.\w+_proj is (80 x 64|64 x 80), .* multiples of 32"):
        exported(tmp_path / "q", "gptq", tmp_path / "out")
    out = exported(tmp_path / "q", "compressed-tensors", tmp_path / "ct")
    assert torch.equal(read_back(out), tiny.logits(plain(tmp_path / "q")))


def test_gptq_refuses_scales_that_float16_does_not_hold(native: Natives, tmp_path: Path) -> None:
    fine = tmp_path / "fine"
    tiny.quantize(native.floats(), fine, QuantConfig(group_size=32, scale_dtype="bfloat16"))
    exported(fine, "gptq", tmp_path / "held")  # bfloat16 numbers of usual size are float16 numbers
    tiny.quantize(native.floats(), tmp_path / "q32", QuantConfig.model_validate(FLOAT32_SCALES))
    words = r"weight_scale has values that float16 does not hold; quantize with scale_dtype: float16"
    with pytest.raises(InputError, match=words):
        exported(tmp_path / "q32", "gptq", tmp_path / "out")
    floats = tmp_path / "small"
    tiny.copied(native.floats(), floats)
    tiny.change(floats, **{f"{Q_PROJ}.weight": tiny.stored(floats)[f"{Q_PROJ}.weight"] * 1e-8})
    tiny.quantize(floats, tmp_path / "q16", QuantConfig(group_size=32, scale_dtype="bfloat16"))
    with pytest.raises(InputError, match=rf"{Q_PROJ}\.{words}"):
        exported(tmp_path / "q16", "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gptq_refuses_a_bias_beyond_float16(tmp_path: Path) -> None:
    floats = tiny.llama(tmp_path / "float", bias=True)
    bias = tiny.stored(floats)[f"{Q_PROJ}.bias"]
    bias[3] = 1e6
    tiny.change(floats, **{f"{Q_PROJ}.bias": bias})
    tiny.quantize(floats, tmp_path / "q", QuantConfig(group_size=32))
    words = r"bias has values that float16 does not hold; export compressed-tensors"
    with pytest.raises(InputError, match=rf"{Q_PROJ}\.{words}"):
        exported(tmp_path / "q", "gptq", tmp_path / "out")


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_a_dtype_that_does_not_hold_what_stays_float_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    floats = tiny.llama(tmp_path / "float", dtype=torch.float32)
    tiny.quantize(floats, tmp_path / "q", QuantConfig(group_size=32))
    with pytest.raises(InputError, match="float16"):
        exported(tmp_path / "q", name, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


# compressed-tensors


@pytest.mark.parametrize("grid", [*(grid for grid in GRIDS if "asym" not in grid), "mixed", "skipped"])
def test_compressed_tensors_loads_in_plain_transformers_with_equal_logits(
    grid: str, native: Natives, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    folder = native(grid)
    model = plain(native.export("compressed-tensors", grid))
    assert (tiny.logits(model) - native.logits[folder]).abs().max() == 0.0


@pytest.mark.parametrize("grid", ["w2g32-asym", "w3pc-asym", "w4g32-asym", "w8g32-asym"])
def test_compressed_tensors_asymmetric_loads_dequantized_with_the_same_weights(
    grid: str, native: Natives, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    folder, out = native(grid), native.export("compressed-tensors", grid)
    assert "CompressedTensorsConfig(dequantize=True)" in (out / "README.md").read_text()
    model = plain(out, quantization_config=CompressedTensorsConfig(dequantize=True))
    source = NativeCheckpoint(folder)
    half_step = 2**-11  # relative: compressed-tensors multiplies in float16, the dtype of the scales
    for name in source.specs:
        expected = dequantize(*source.quantized(name))
        assert torch.allclose(model.get_parameter(f"{name}.weight"), expected, rtol=half_step, atol=1e-8), name
    largest = float(native.logits[folder].abs().max())
    assert torch.allclose(tiny.logits(model), native.logits[folder], rtol=0, atol=4 * half_step * largest)


def test_compressed_tensors_asymmetric_is_exact_or_stops_but_is_never_wrong(native: Natives) -> None:
    pytest.importorskip("compressed_tensors")
    folder = native("w4g32-asym")
    try:
        model = plain(native.export("compressed-tensors", "w4g32-asym"))
    except (RuntimeError, ValueError):
        return  # 0.18 to 0.20 expect zero points of another shape; the model card names a way out
    assert torch.equal(tiny.logits(model), native.logits[folder])


def test_compressed_tensors_names_every_float_linear_and_every_grid(native: Natives) -> None:
    mixed = native.export("compressed-tensors", "mixed")
    section = read_config(mixed)["quantization_config"]
    targets = [name for group in section["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(NativeCheckpoint(native("mixed")).specs)
    assert section["ignore"] == ["lm_head"]
    section = read_config(native.export("compressed-tensors", "skipped"))["quantization_config"]
    assert sorted(section["ignore"]) == ["lm_head", "model.layers.1.mlp.up_proj"]
    card = (mixed / "README.md").read_text()
    assert "never load this with dequantize=True" in card
    assert "compressed-tensors 0.18 or later" in card  # 3 bits need that version


def test_compressed_tensors_is_written_in_a_dtype_that_holds_its_scales(native: Natives, tmp_path: Path) -> None:
    for grid in ("w8g32", "w4g32"):
        out = native.export("compressed-tensors", grid)
        dtype = getattr(torch, read_config(out)["dtype"])
        for name, tensor in tiny.stored(out).items():
            if tensor.is_floating_point():
                assert torch.equal(tensor.to(dtype).float(), tensor.float()), name
    own = read_config(native.floats())["dtype"]  # with negative scales of 4 bits, an eighth of the largest weights
    assert dtype == getattr(torch, own)
    out = native.export("compressed-tensors", "w8g32")
    assert read_config(out)["dtype"] != own
    assert f"{own} does not hold its scales" in (out / "README.md").read_text()
    tiny.quantize(native.floats(), tmp_path / "q", QuantConfig(group_size=32, scale_dtype="bfloat16"))
    out = exported(tmp_path / "q", "compressed-tensors", tmp_path / "same")
    assert read_config(out)["dtype"] == "bfloat16"
    assert "does not hold" not in (out / "README.md").read_text()
