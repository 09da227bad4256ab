"""An export holds exactly what the checkpoint holds, or is refused with the reason; a damaged one is never kept.

Every format goes through the same contract. Then each has its outside readers: plain transformers for ``dense``,
compressed-tensors for its own format, GPTQModel (slow, in an environment of its own) for ``gptq``.
"""

import json
import os
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool import export, run, verify
from qtool.checkpoint import Source, write_json
from qtool.config import BITS, ExportConfig, ModelConfig, QuantConfig
from qtool.errors import InputError, QtoolError, RunError
from qtool.folders import read_config
from qtool.models import load_model
from qtool.quant.affine import dequantize

GRIDS = {
    f"w{bits}{'g32' if group > 0 else 'pc'}{'' if symmetric else '-asym'}": QuantConfig(
        num_bits=bits, group_size=group, symmetric=symmetric
    )
    for bits in BITS
    for group in (-1, 32)
    for symmetric in (True, False)
}
MIXED = {
    "mixed": QuantConfig.model_validate(
        {
            "num_bits": 4,
            "group_size": 32,
            "overrides": {
                "*.down_proj": {"num_bits": 8},
                "*.v_proj": {"num_bits": 2, "group_size": -1},
                "*.1.mlp.up_proj": {"num_bits": 3},
            },
        }
    ),
    "mixed-asym": QuantConfig.model_validate(
        {"num_bits": 3, "group_size": 32, "symmetric": False, "overrides": {"*.down_proj": {"num_bits": 8}}}
    ),
    "skipped": QuantConfig.model_validate({"group_size": 32, "overrides": {"*.1.mlp.up_proj": {"skip": True}}}),
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


class Natives:
    """Native checkpoints of the tiny models by family and grid, and their exports, made when they are asked for."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self.logits: dict[Path, Tensor] = {}

    def floats(self, grid: str = "w4g32", family: str = "llama") -> Path:
        """The float model: a Llama of one block, or of two where a mix tells them apart."""
        blocks = 2 if grid in MIXED else 1
        folder = self.at / (f"llama-{blocks}" if family == "llama" else family)
        if not folder.exists():
            tiny.llama(folder, blocks=blocks) if family == "llama" else tiny.FAMILIES[family](folder)
        return folder

    def __call__(self, grid: str = "w4g32", family: str = "llama") -> Path:
        out = self.at / f"{family}-{grid}"
        if not out.exists():
            written = tiny.quantize(self.floats(grid, family), out, (GRIDS | MIXED)[grid])
            self.logits[out] = tiny.logits(written.model)
        return out

    def export(self, name: str, grid: str = "w4g32") -> Path:
        """The export as it comes; only read it."""
        out = self.at / "exports" / f"{grid}-{name}"
        return out if out.exists() else exported(self(grid), name, out)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


def exported(folder: Path, name: str, out: Path, dtype: str = "auto", overwrite: bool = False) -> Path:
    config = ExportConfig(format=name, path=out, dtype=dtype)  # type: ignore[arg-type]
    return run.export(folder, config, overwrite)


def plain(folder: Path, **options: object) -> torch.nn.Module:
    """The model as plain transformers loads it, in float32."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model


def read_back(folder: Path) -> Tensor:
    """Logits of an export as ``qtool eval`` reads it."""
    loaded = verify.load_exported(ModelConfig(path=str(folder), dtype="float32", device="cpu"))
    assert loaded is not None
    return tiny.logits(loaded.model)


def same_floats(folder: Path, out: Path) -> bool:
    source, tensors = Source(folder), tiny.stored(out)
    return all(torch.equal(tensors[name].float(), source.tensor(name).float()) for name in source.float_names())


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


# the contract


def test_the_formats_are_the_files() -> None:
    assert export.names() == ("compressed-tensors", "dense", "gptq", "gptq-v2")
    for name in export.names():
        assert len(export.get(name).summary) > 10


@pytest.mark.parametrize("name", export.names())
@pytest.mark.parametrize("grid", [*GRIDS, *MIXED])
def test_an_export_holds_the_same_weights_or_is_refused_with_the_reason(
    name: str, grid: str, native: Natives, tmp_path: Path
) -> None:
    folder, out = native(grid), tmp_path / "out"
    source, exporter = Source(folder), export.get(name)
    reason = exporter.refuses(source, ExportConfig(format=name, path=out))
    assert (reason is not None) == (grid in MIXED and name.startswith("gptq")), reason
    if reason is not None:
        with pytest.raises(InputError) as error:
            exported(folder, name, out)
        assert str(error.value) == f"{folder} cannot be exported as {name}: {reason}"
        assert not list(tmp_path.iterdir())
        return
    out = native.export(name, grid)
    assert f"{out.name}.partial" not in [each.name for each in out.parent.iterdir()]
    for linear in source.specs:
        assert torch.equal(exporter.read(out, linear), dequantize(*source.quantized(linear))), linear
    assert same_floats(folder, out)
    if name != "dense" and "pc" not in grid:
        assert torch.equal(read_back(out), native.logits[folder])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("name", export.names())
def test_biases_and_transposed_linears_are_exported_or_refused(
    name: str, family: str, native: Natives, tmp_path: Path
) -> None:
    folder, out = native("w4g32-asym", family), tmp_path / "out"
    if family == "gpt2" and name != "dense":
        with pytest.raises(InputError, match=r"is a Conv1D, .*; export dense instead"):
            exported(folder, name, out)
        assert not out.exists()
        return
    exported(folder, name, out)
    assert same_floats(folder, out)
    logits = tiny.logits(plain(out)) if name == "dense" else read_back(out)
    assert torch.equal(logits, native.logits[folder])


@pytest.mark.parametrize("name", export.names())
def test_an_export_has_all_that_a_model_folder_needs(name: str, native: Natives) -> None:
    folder, out = native(), native.export(name)
    files = {file.name for file in out.iterdir()}
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == kept | {"model.safetensors", "README.md"} | ({"quantize_config.json"} if "gptq" in name else set())
    config, ours = read_config(out), read_config(folder)
    section = config.pop("quantization_config", None)
    assert (section is None) == (name == "dense")
    assert "qtool" not in json.dumps(config)
    assert {key: value for key, value in config.items() if key != "dtype"} == {
        key: value for key, value in ours.items() if key not in ("dtype", "quantization_config")
    }
    card = (out / "README.md").read_text()
    assert f"as {name}" in card
    assert "largest weight difference 0, largest logit difference 0 of" in card or name == "dense"
    assert not (out.stat().st_mode ^ folder.stat().st_mode)


def test_an_export_of_tied_embeddings_stores_them_once(tmp_path: Path) -> None:
    tiny.quantize(tiny.llama(tmp_path / "float", tied=True), tmp_path / "q", QuantConfig(group_size=32))
    for name in export.names():
        out = exported(tmp_path / "q", name, tmp_path / name)
        assert "lm_head.weight" not in tiny.stored(out)
        assert read_config(out)["tie_word_embeddings"] is True
    assert torch.equal(tiny.logits(plain(tmp_path / "dense")), tiny.logits(plain(tmp_path / "q")))


def test_a_sharded_checkpoint_exports_as_well(native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.checkpoint.MAX_SHARD_SIZE", 30_000)
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
    assert read_config(out)["dtype"] == "float32"  # 4 bits times the 11 of a float16 scale are more than bfloat16 has
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
    source, tensors = Source(folder), tiny.stored(out)
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
    for name in Source(folder).specs:
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
    weight = floats.model.get_submodule(Q_PROJ).weight
    weight.copy_(weight.abs() + 0.01)  # nothing below zero: the grid begins at code 0
    floats.model.to(torch.bfloat16).save_pretrained(tmp_path / "float")
    floats.tokenizer.save_pretrained(tmp_path / "float")
    for bits in BITS:
        folder = tmp_path / f"q{bits}"
        written = tiny.quantize(tmp_path / "float", folder, QuantConfig(num_bits=bits, group_size=32, symmetric=False))
        assert not Source(folder).quantized(Q_PROJ).zero_point.any()
        out = exported(folder, "gptq", tmp_path / f"out{bits}")
        assert not tiny.stored(out)[f"{Q_PROJ}.qzeros"].any()
        assert torch.equal(read_back(out), tiny.logits(written.model))


def test_gptq_refuses_mixed_grids_and_linears_left_in_float(native: Natives, tmp_path: Path) -> None:
    for grid, words in {
        "mixed": r"4 different grids, .*; export compressed-tensors instead",
        "skipped": r"layers\.1\.mlp\.up_proj is left in floating point, .*; export compressed-tensors instead",
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
    tiny.quantize(native.floats(), tmp_path / "q32", QuantConfig(group_size=32, scale_dtype="float32"))
    words = r"weight_scale has values that float16 does not hold; quantize with scale_dtype: float16"
    with pytest.raises(InputError, match=words):
        exported(tmp_path / "q32", "gptq", tmp_path / "out")
    floats = tmp_path / "small"
    copied(native.floats(), floats)
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
    with pytest.raises(InputError, match=rf"{Q_PROJ}\.bias has values that float16 does not hold"):
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
    source = Source(folder)
    half_step = 2**-11  # it multiplies in float16, the dtype of the scales
    for name in source.specs:
        expected = dequantize(*source.quantized(name))
        assert torch.allclose(model.get_submodule(name).weight, expected, rtol=half_step, atol=1e-8), name
    largest = float(native.logits[folder].abs().max())
    assert torch.allclose(tiny.logits(model), native.logits[folder], rtol=0, atol=4 * half_step * largest)


def test_compressed_tensors_asymmetric_is_exact_or_stops_but_is_never_wrong(native: Natives) -> None:
    pytest.importorskip("compressed_tensors")
    folder = native("w4g32-asym")
    try:
        model = plain(native.export("compressed-tensors", "w4g32-asym"))
    except (RuntimeError, ValueError):
        return  # 0.18 to 0.20: the shape of the zero points; our model card says what to do
    assert torch.equal(tiny.logits(model), native.logits[folder])


def test_compressed_tensors_names_every_float_linear_and_every_grid(native: Natives) -> None:
    mixed = native.export("compressed-tensors", "mixed")
    section = read_config(mixed)["quantization_config"]
    targets = [name for group in section["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(Source(native("mixed")).specs)
    assert section["ignore"] == ["lm_head"]
    section = read_config(native.export("compressed-tensors", "skipped"))["quantization_config"]
    assert sorted(section["ignore"]) == ["lm_head", "model.layers.1.mlp.up_proj"]
    card = (mixed / "README.md").read_text()
    assert "never load this with dequantize=True" in card
    assert "compressed-tensors 0.18 or later" in card  # it has a 3-bit linear


def test_compressed_tensors_is_written_in_a_dtype_that_holds_its_scales(native: Natives, tmp_path: Path) -> None:
    out = native.export("compressed-tensors")
    dtype = getattr(torch, read_config(out)["dtype"])
    for name, tensor in tiny.stored(out).items():
        if tensor.is_floating_point():
            assert torch.equal(tensor.to(dtype).float(), tensor.float()), name
    assert "bfloat16 does not hold its scales" in (out / "README.md").read_text()
    tiny.quantize(native.floats(), tmp_path / "q", QuantConfig(group_size=32, scale_dtype="bfloat16"))
    out = exported(tmp_path / "q", "compressed-tensors", tmp_path / "same")
    assert read_config(out)["dtype"] == "bfloat16"
    assert "does not hold" not in (out / "README.md").read_text()


# verify


def flip_one_bit(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    flat = changed.view(torch.int32).flatten() if tensor.dtype.itemsize == 4 else changed.view(torch.int16).flatten()
    flat[7] ^= 1 << 9
    return changed


def next_up(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]).flatten()[3] += 1
    return changed


PACKED = {"gptq": "qweight", "gptq-v2": "qweight", "compressed-tensors": "weight_packed", "dense": "weight"}
SCALES = {"gptq": "scales", "gptq-v2": "scales", "compressed-tensors": "weight_scale"}
ZEROS = {"gptq": "qzeros", "gptq-v2": "qzeros", "compressed-tensors": "weight_zero_point"}


def plant(name: str, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Make the exporter ``name`` write a folder and then damage it."""
    module = import_module(f"qtool.export.{name.replace('-', '_')}")

    def write(source: Source, out: Path, config: ExportConfig) -> list[str]:
        notes: list[str] = original.write(source, out, config)
        damage(out)
        return notes

    original = module.EXPORTER
    monkeypatch.setattr(module, "EXPORTER", original._replace(write=write))


def damaging(tensor: str, how: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        tensors = load_file(out / "model.safetensors")
        tensors[tensor] = how(tensors[tensor])
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("name", "tensor", "how"),
    [
        *((name, f"{Q_PROJ}.{part}", flip_one_bit) for name, part in PACKED.items()),
        *((name, f"{Q_PROJ}.{part}", next_up) for name, part in SCALES.items()),
        *((name, f"{Q_PROJ}.{part}", flip_one_bit) for name, part in ZEROS.items()),
        *((name, "model.layers.0.input_layernorm.weight", next_up) for name in PACKED),
        ("gptq", f"{Q_PROJ}.g_idx", lambda tensor: tensor.flip(0)),
        ("dense", "lm_head.weight", next_up),
    ],
)
def test_a_changed_bit_is_found_and_the_export_is_not_kept(
    name: str,
    tensor: str,
    how: Callable[[Tensor], Tensor],
    native: Natives,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = native("w4g32-asym")
    plant(name, monkeypatch, damaging(tensor, how))
    with pytest.raises(RunError, match=rf"{tensor.rpartition('.')[0]}.* differs after export.*not kept"):
        exported(folder, name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_overwrite_keeps_the_export_that_was_there(
    native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = exported(native(), "gptq", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    plant("gptq", monkeypatch, damaging(f"{Q_PROJ}.scales", next_up))
    with pytest.raises(RunError):
        exported(native(), "gptq", out, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", export.names())
def test_a_config_that_makes_another_model_of_the_weights_is_found(
    name: str, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(out: Path) -> None:
        write_json(out / "config.json", read_config(out) | {"rms_norm_eps": 0.5})

    plant(name, monkeypatch, damage)
    with pytest.raises(RunError, match="differ"):
        exported(native(), name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# reading exports


def test_native_and_plain_folders_are_no_exports(native: Natives) -> None:
    for folder in (native(), native.floats()):
        assert verify.load_exported(ModelConfig(path=str(folder))) is None


def test_an_export_is_computed_in_the_same_dtype_as_its_checkpoint(
    native: Natives, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    ours = load_model(ModelConfig(path=str(native()), device="cpu"), quantized=True)
    theirs = verify.load_exported(ModelConfig(path=str(native.export("gptq")), device="cpu"))
    assert theirs is not None
    assert theirs.dtype == ours.dtype == torch.bfloat16
    assert torch.equal(tiny.logits(theirs.model), tiny.logits(ours.model))


def test_a_gptq_folder_needs_no_second_config_file(native: Natives, tmp_path: Path) -> None:
    folder = native("w4g32-asym")
    out = copied(native.export("gptq", "w4g32-asym"), tmp_path / "out")
    (out / "quantize_config.json").unlink()  # transformers' save_pretrained writes none
    assert torch.equal(read_back(out), native.logits[folder])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("compressed-tensors", {"format": "nvfp4-pack-quantized"}),
        ("compressed-tensors", {"config_groups": {}}),
        ("gptq", {"bits": 5}),
        ("gptq", {"checkpoint_format": "marlin", "format": "marlin"}),
    ],
    ids=str,
)
def test_another_tools_variant_that_cannot_be_read_is_refused_in_words(
    name: str, changes: dict[str, object], native: Natives, tmp_path: Path
) -> None:
    out = copied(native.export(name), tmp_path / "out")
    config = read_config(out)
    config["quantization_config"] |= changes
    write_json(out / "config.json", config)
    if name == "gptq":
        write_json(out / "quantize_config.json", config["quantization_config"])
    with pytest.raises(InputError) as error:
        read_back(out)
    assert str(out) in str(error.value)


def test_targets_by_pattern_are_read_as_compressed_tensors_reads_them(native: Natives, tmp_path: Path) -> None:
    out = copied(native.export("compressed-tensors", "mixed-asym"), tmp_path / "out")
    config = read_config(out)
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = [
            r"re:.*down_proj$" if group["weights"]["num_bits"] == 8 else r"re:.*(q|k|v|o|gate|up)_proj$"
        ]
    write_json(out / "config.json", config)  # what llm-compressor writes
    try:
        assert torch.equal(read_back(out), native.logits[native("mixed-asym")])
    except QtoolError as error:
        assert "re:" in str(error)  # noqa: PT017 (refusing is as good as reading)


# outside witnesses

WITNESS = Path(__file__).parents[1] / "scripts" / "bench" / "witness_gptq.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "gptq-v2"])
@pytest.mark.parametrize("grid", ["w2g32", "w3g32", "w4g32", "w8g32", "w4pc", "w2g32-asym", "w3g32-asym", "w4g32-asym"])
def test_gptqmodel_reads_the_same_weights_and_logits(name: str, grid: str, native: Natives, tmp_path: Path) -> None:
    python = os.environ.get("QTOOL_GPTQMODEL_PYTHON")
    if not python:
        pytest.skip("set QTOOL_GPTQMODEL_PYTHON to the Python of an environment with gptqmodel 7.x")
    folder, out = native(grid), native.export(name, grid)
    file = tmp_path / "witness.safetensors"
    done = subprocess.run([python, WITNESS, out, file, "--weights"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    witness = load_file(file)
    source = Source(folder)
    for linear in source.specs:
        assert torch.equal(witness[f"{linear}.weight"], dequantize(*source.quantized(linear))), linear
    with torch.no_grad():
        ours = plain(folder)(witness["tokens"]).logits
    assert torch.allclose(witness["logits"], ours, rtol=0, atol=1e-4 * float(ours.abs().max()))
