"""An export has the config and the files of the float model, and holds no value that its dtype makes infinite."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import published, tiny
from helpers.native_checkpoints import GRIDS, exported, plain, read_back

from qtool.checkpoints import native, side_files
from qtool.checkpoints.files import file_hashes, write_json
from qtool.checkpoints.native import NativeCheckpoint, PlannedCheckpoint
from qtool.config import catalog
from qtool.config.sections import ExportConfig
from qtool.exporters import _base, _folder
from qtool.models.folders import read_config
from qtool.system.errors import InputError, RunError

OLDER = ("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings")
HUGE = 99_840.0  # a bfloat16 above the range of float16
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def native_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("llama3")
    folder = published.write("llama 3", at / "float", older=True)
    for name in ("tokenizer.model", "preprocessor_config.json"):
        (folder / name).write_bytes(b"{ }\r\n")
    tiny.quantize(folder, at / "q", GRIDS["w4g32"])
    tiny.quantize(folder, at / "rows", GRIDS["w4pc"])
    return at / "q"


def held_by(name: str, native_llama: Path) -> Path:
    """Return the checkpoint with a grid that the format holds."""
    return native_llama.parent / "rows" if name == "gemma" else native_llama


@pytest.mark.parametrize("name", catalog.export_formats())
def test_every_format_carries_the_older_keys_and_the_files(name: str, native_llama: Path, tmp_path: Path) -> None:
    out = exported(held_by(name, native_llama), name, tmp_path / "out")
    source, config = read_config(native_llama.parent / "float"), read_config(out)
    assert {key: config[key] for key in ("rope_theta", "rope_scaling")} == published.MODELS["llama 3"][3]
    assert source["rope_theta"] == config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    carried = file_hashes(native_llama.parent / "float", *side_files.PATTERNS)
    assert {"tokenizer.model", "preprocessor_config.json", "tokenizer.json"} <= carried.keys()
    assert file_hashes(out, *side_files.PATTERNS) == carried


@pytest.mark.parametrize("name", catalog.export_formats())
def test_files_of_unknown_names_and_links_are_not_exported(name: str, native_llama: Path, tmp_path: Path) -> None:
    folder = tiny.copied(held_by(name, native_llama), tmp_path / "q")
    (tmp_path / "secret").write_text("TOPSECRET")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    out = exported(folder, name, tmp_path / "out")
    assert not (out / "notes.txt").exists()
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"tokenizer\.model is a link to .*secret, which is outside"):
        exported(folder, name, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["dense", "mlx", "compressed-tensors"])
def test_a_checkpoint_without_older_keys_is_exported_with_them(name: str, native_llama: Path, tmp_path: Path) -> None:
    folder = tiny.copied(native_llama, tmp_path / "q")  # as save_pretrained writes it
    config = {key: value for key, value in read_config(folder).items() if not key.startswith("rope_s")}
    del config["rope_theta"]
    write_json(folder / "config.json", config)
    made = read_config(exported(folder, name, tmp_path / "out"))
    assert made["rope_theta"] == 500.0
    assert made["rope_scaling"] == published.LLAMA_3 | {"type": "llama3"}


@pytest.mark.parametrize("name", ["dense", "mlx", "compressed-tensors", "gptq"])
def test_a_head_of_its_own_is_not_said_to_be_tied(name: str, tmp_path: Path) -> None:
    folder = published.quantized("own head", tmp_path, older=True)
    published.change_json(folder / "config.json", tie_word_embeddings=True)  # as earlier versions wrote it
    out = exported(folder, name, tmp_path / "out")
    assert read_config(out)["tie_word_embeddings"] is False
    if name != "dense":
        with torch.no_grad():
            ours = tiny.logits(plain(folder))
        assert torch.allclose(read_back(out), ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 9.0), ("rope_scaling", None), ("tie_word_embeddings", True)], ids=str
)
def test_a_written_key_by_which_older_readers_compute_another_model_is_found(
    key: str, value: object, native_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(file: Path, content: dict[str, object]) -> None:
        write_json(file, content | {key: value})

    monkeypatch.setattr(_folder, "write_json", write)
    found = {"rope_theta": "rope_parameters.rope_theta", "rope_scaling": "rope_theta"}.get(key, key)
    with pytest.raises(RunError, match=f"config.json differs after export, in {found}; the export was not kept"):
        exported(native_llama, "dense", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_gpt_neox_is_written_with_the_published_name_of_its_head(tmp_path: Path) -> None:
    folder = published.quantized("gpt neox", tmp_path, older=True)
    out = exported(folder, "dense", tmp_path / "out")
    names = set(tiny.stored(out))
    assert "embed_out.weight" in names
    assert "lm_head.weight" not in names
    assert set(tiny.stored(tmp_path / "float")) == names


# dtypes


@pytest.mark.parametrize("name", catalog.export_formats())
def test_a_dtype_that_a_norm_exceeds_is_refused_with_the_value(name: str, tmp_path: Path) -> None:
    floats = tiny.llama(tmp_path / "float")
    norm = tiny.stored(floats)[NORM]
    norm[3] = -HUGE
    tiny.change(floats, **{NORM: norm})
    tiny.quantize(floats, tmp_path / "q", GRIDS["w4pc" if name == "gemma" else "w4g32"])
    expected = f"{NORM} has values of up to {HUGE:g}, and float16 holds none above 65504; use dtype: auto"
    with pytest.raises(InputError, match=re.escape(expected)):
        exported(tmp_path / "q", name, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def with_large_weight(at: Path) -> Path:
    floats = tiny.llama(at)
    weight = tiny.stored(floats)["model.layers.0.mlp.down_proj.weight"]
    weight[0, 0] = HUGE
    tiny.change(floats, model__layers__0__mlp__down_proj__weight=weight)
    return floats


def test_a_dtype_that_a_dequantized_weight_exceeds_is_refused(tmp_path: Path) -> None:
    quant = GRIDS["w4g32"].model_copy(update={"scale_dtype": "float32"})
    tiny.quantize(with_large_weight(tmp_path / "float"), tmp_path / "q", quant)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj has values of up to .*, and float16 holds none"):
        exported(tmp_path / "q", "dense", tmp_path / "out", "float16")
    assert exported(tmp_path / "q", "dense", tmp_path / "out", "bfloat16").exists()


def test_it_is_refused_before_anything_is_quantized(tmp_path: Path) -> None:
    floats = with_large_weight(tmp_path / "float")
    loaded = tiny.load(floats)
    quant = GRIDS["w4g32"].model_copy(update={"scale_dtype": "float32"})
    specs = tiny.specs(tiny.packed(floats, quant))
    shapes = dict.fromkeys(specs, (64, 96))
    planned = PlannedCheckpoint(loaded, specs, shapes)
    asked = ExportConfig(format="dense", path=tmp_path / "out", dtype="float16")
    refusal = _base.refusal("dense", planned, asked)
    assert refusal is not None
    assert f"down_proj has values of up to {HUGE:g}" in refusal
    assert _base.refusal("dense", planned, asked.model_copy(update={"dtype": "bfloat16"})) is None


def test_a_change_of_float64_values_beyond_float32_is_seen() -> None:
    assert _folder.inexact([torch.tensor([1e300], dtype=torch.float64)], "float32") == float("inf")
    assert _folder.inexact([torch.tensor([0.1], dtype=torch.float64)], "float32") > 0


# what can be written before there are weights


@pytest.mark.parametrize("name", catalog.export_formats())
def test_what_is_written_before_the_first_block_is_what_the_export_has(
    name: str, native_llama: Path, tmp_path: Path
) -> None:
    floats, native_llama = native_llama.parent / "float", held_by(name, native_llama)
    specs = NativeCheckpoint(native_llama).specs
    loaded = tiny.load(floats)
    (tmp_path / "q").mkdir()
    native.describe(tmp_path / "q", loaded, specs)
    assert file_hashes(tmp_path / "q", "*.json*") == file_hashes(native_llama, "*.json*")
    planned = PlannedCheckpoint(loaded, specs, NativeCheckpoint(native_llama).shapes)
    planned.folder = tmp_path / "q"
    (tmp_path / "before").mkdir()
    config = read_config(exported(native_llama, name, tmp_path / "after"))
    _base.get(name).describe(planned, tmp_path / "before", config["dtype"])
    assert read_config(tmp_path / "before") == config
    after = file_hashes(tmp_path / "after", "*.json", "*.model")
    after.pop("qtool_export.json")  # it has the hashes of the weights
    assert file_hashes(tmp_path / "before", "*.json", "*.model") == after
    assert not list((tmp_path / "before").glob("*.safetensors"))
    assert json.loads((tmp_path / "before" / "config.json").read_text())["rope_theta"] == 500.0
