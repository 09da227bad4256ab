"""A damaged export is found and never kept; exports of other tools are read or refused."""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.native_checkpoints import Q_PROJ, Natives, exported, read_back
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config import catalog
from qtool.config.sections import ExportConfig, ModelConfig
from qtool.exporters import _readback
from qtool.models.folders import read_config
from qtool.models.loading import load_model
from qtool.system.errors import InputError, QtoolError, RunError


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


# reading back


def flip_one_bit(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    flat = changed.view(torch.int32).flatten() if tensor.dtype.itemsize == 4 else changed.view(torch.int16).flatten()
    flat[7] ^= 1 << 9
    return changed


def next_up(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]).flatten()[3] += 1
    return changed


GPTQ = ("gptq", "gptq-v2", "auto-round")
PACKED = {**dict.fromkeys(GPTQ, "qweight"), "compressed-tensors": "weight_packed", "dense": "weight", "mlx": "weight"}
SCALES = {**dict.fromkeys(GPTQ, "scales"), "compressed-tensors": "weight_scale", "mlx": "scales"}
ZEROS = {**dict.fromkeys(GPTQ, "qzeros"), "compressed-tensors": "weight_zero_point", "mlx": "biases"}


def plant(name: str, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Make the exporter ``name`` write a folder and then damage it."""
    module = import_module(f"qtool.exporters.{name.replace('-', '_')}")

    def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
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


@pytest.mark.parametrize("name", catalog.export_formats())
def test_a_config_that_makes_another_model_of_the_weights_is_found(
    name: str, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(out: Path) -> None:
        write_json(out / "config.json", read_config(out) | {"rms_norm_eps": 0.5})

    plant(name, monkeypatch, damage)
    with pytest.raises(RunError, match="differ"):
        exported(native.plain(name), name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# exports of other tools


def test_native_and_plain_folders_are_no_exports(native: Natives) -> None:
    for folder in (native(), native.floats()):
        assert _readback.load_exported(ModelConfig(path=str(folder))) is None


@pytest.mark.parametrize("name", ["auto-round", "gguf", "gptq", "mlx"])
def test_an_export_is_computed_in_the_same_dtype_as_its_checkpoint(
    name: str, native: Natives, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    ours = load_model(ModelConfig(path=str(native()), device="cpu"), quantized=True)
    theirs = _readback.load_exported(ModelConfig(path=str(native.export(name)), device="cpu"))
    assert theirs is not None
    assert theirs.dtype == ours.dtype == torch.bfloat16
    assert torch.equal(tiny.logits(theirs.model), tiny.logits(ours.model))


def test_a_gptq_folder_needs_no_second_config_file(native: Natives, tmp_path: Path) -> None:
    folder = native("w4g32-asym")
    out = tiny.copied(native.export("gptq", "w4g32-asym"), tmp_path / "out")
    (out / "quantize_config.json").unlink()  # transformers' save_pretrained writes none
    assert torch.equal(read_back(out), native.logits[folder])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("compressed-tensors", {"format": "nvfp4-pack-quantized"}),
        ("compressed-tensors", {"config_groups": {}}),
        ("gptq", {"bits": 5}),
        ("gptq", {"checkpoint_format": "marlin", "format": "marlin"}),
        ("auto-round", {"packing_format": "auto_round:auto_awq"}),
        ("auto-round", {"bits": 5}),
        ("mlx", {"mode": "mxfp4"}),
        ("mlx", {"bits": 6}),
        ("auto-round", {"extra_config": {"q_proj": {"bits": 6}}}),
    ],
    ids=str,
)
def test_another_tools_variant_that_cannot_be_read_is_refused_in_words(
    name: str, changes: dict[str, object], native: Natives, tmp_path: Path
) -> None:
    out = tiny.copied(native.export(name), tmp_path / "out")
    config = read_config(out)
    config["quantization_config"] |= changes
    if name == "mlx":
        config["quantization"] |= changes
    write_json(out / "config.json", config)
    if name == "gptq":
        write_json(out / "quantize_config.json", config["quantization_config"])
    with pytest.raises(InputError) as error:
        read_back(out)
    assert str(out) in str(error.value)


def test_extra_config_by_pattern_is_read_as_auto_round_reads_it(native: Natives, tmp_path: Path) -> None:
    out = tiny.copied(native.export("auto-round", "mixed-asym"), tmp_path / "out")
    config = read_config(out)
    config["quantization_config"]["extra_config"] = {"down_proj": {"bits": 8}}  # a setting of auto-round
    write_json(out / "config.json", config)
    assert torch.equal(read_back(out), native.logits[native("mixed-asym")])


def test_targets_by_pattern_are_read_as_compressed_tensors_reads_them(native: Natives, tmp_path: Path) -> None:
    out = tiny.copied(native.export("compressed-tensors", "mixed-asym"), tmp_path / "out")
    config = read_config(out)
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = [
            r"re:.*down_proj$" if group["weights"]["num_bits"] == 8 else r"re:.*(q|k|v|o|gate|up)_proj$"
        ]
    write_json(out / "config.json", config)  # the pattern that llm-compressor writes
    try:
        assert torch.equal(read_back(out), native.logits[native("mixed-asym")])
    except QtoolError as error:
        assert "re:" in str(error)  # noqa: PT017 (refusing is as good as reading)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "auto-round", "mlx"])
@pytest.mark.parametrize("value", [[1], "x", None, {"group_0": {"targets": [["x"]], "weights": {}}}], ids=str)
def test_a_quantization_config_of_another_form_is_no_bug(
    native: Natives, tmp_path: Path, name: str, value: object
) -> None:
    """Each key in turn; a value that a format does not need may be read."""
    for key in read_config(native.export(name))["quantization_config"]:
        out = tiny.copied(native.export(name), tmp_path / key)
        config = read_config(out)
        config["quantization_config"][key] = value
        write_json(out / "config.json", config)
        with suppress(InputError):
            _readback.load_exported(ModelConfig(path=str(out), device="cpu"))
