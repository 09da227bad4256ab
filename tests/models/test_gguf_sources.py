"""A GGUF file loads as the float model that it stands for, with its tokenizer; what would be lost of it is refused."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import gguf_families, gguf_models, tiny, vocabularies
from helpers.native_checkpoints import GRIDS, Natives, exported, plain
from helpers.notes import Notes
from transformers import AutoTokenizer

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.sections import ModelConfig
from qtool.exporters.gguf.families import FAMILIES
from qtool.models import gguf_header
from qtool.models.folders import read_config, resolve
from qtool.models.gguf_config import READ
from qtool.models.gguf_splits import SPLITS
from qtool.models.gguf_view import source_of
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.quant.affine import dequantize
from qtool.system import progress
from qtool.system.errors import InputError

gguf = pytest.importorskip("gguf")
# cases of ``gguf_families`` that transformers reads as the model that they were written from
CASES = (
    *("llama", "llama, linear", "llama, yarn", "llama 3", "mistral", "qwen2", "qwen2, yarn", "qwen3"),
    *("qwen2_moe", "qwen3_moe", "qwen3_5", "qwen3_5, as many heads", "qwen3_5_moe"),
    *("gemma2", "gemma3", "gemma3, linear", "phi3", "phi3, partial"),
    *("starcoder2", "stablelm", "stablelm, parallel", "nemotron"),
)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


@pytest.fixture
def notes() -> Iterator[Notes]:
    collected = Notes()
    with progress.use(collected):
        yield collected


def alone(out: Path, to: Path) -> Path:
    """Copy the GGUF file of an export into a folder that has nothing else."""
    to.mkdir(parents=True, exist_ok=True)
    (to / "model.gguf").write_bytes((out / "model.gguf").read_bytes())
    return to / "model.gguf"


def loaded(path: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(ModelConfig.model_validate({"path": str(path), "dtype": dtype, "device": "cpu"}))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        loaded(path)
    return str(error.value)


@pytest.fixture
def small(native: Natives, tmp_path: Path) -> Path:
    """The GGUF file of a tiny Llama in 4 bits."""
    return alone(native.export("gguf", "w4g32"), tmp_path / "small")


def rewritten(file: Path, change: Callable[[object], None] | None = None, **fields: object) -> None:
    """Write ``file`` again with other values of ``fields``, given without dots (``general_architecture``)."""
    reader = gguf.GGUFReader(file)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    writer = gguf.GGUFWriter(file.with_suffix(".new"), fields.pop("architecture", values.pop("general.architecture")))
    values |= {key.replace("__", "."): value for key, value in fields.items()}
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_key_value(key, value, reader.fields[key].types[0] if key in reader.fields else _kind(value))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").replace(file)


def _kind(value: object) -> object:
    return {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}[
        type(value)
    ]


# weights


def test_cases_are_of_every_architecture_that_is_read() -> None:
    assert {FAMILIES[gguf_families.model_type(name)].architecture for name in CASES} == READ.keys()


@pytest.mark.parametrize("name", CASES)
def test_an_export_reads_back_as_the_same_model(name: str, tmp_path: Path) -> None:
    floats = gguf_families.write(name, tmp_path / "float")
    tiny.quantize(floats, tmp_path / "q", GRIDS["w4g32"])
    file = alone(exported(tmp_path / "q", "gguf", tmp_path / "out"), tmp_path / "alone")
    assert torch.equal(tiny.logits(loaded(file).model), tiny.logits(plain(tmp_path / "q")))


@pytest.mark.parametrize("name", ["llama with biases", "llama with wide heads", "llama 3"])
def test_what_transformers_leaves_out_of_llama_is_read(name: str, tmp_path: Path) -> None:
    file = alone(exported(gguf_models.quantized(name, tmp_path), "gguf", tmp_path / "out"), tmp_path / "alone")
    model = loaded(file).model
    assert torch.equal(tiny.logits(model), tiny.logits(plain(tmp_path / "q")))
    assert model.config.attention_bias == model.config.mlp_bias == (name == "llama with biases")


def test_the_builtin_model_is_read_back_from_its_export(tmp_path: Path) -> None:
    tiny.quantize(tiny.BUILTIN, tmp_path / "q", gguf_models.ROWS["Q4_K"])
    file = alone(exported(tmp_path / "q", "gguf", tmp_path / "out"), tmp_path / "alone")
    read, source = loaded(file), NativeCheckpoint(tmp_path / "q")
    for name in source.specs:
        assert torch.equal(read.model.get_parameter(f"{name}.weight"), dequantize(*source.quantized(name))), name
    assert torch.equal(tiny.logits(read.model), tiny.logits(plain(tmp_path / "q")))
    assert json.loads((read.folder / "config.json").read_text())["dtype"] == "float32"
    ours = AutoTokenizer.from_pretrained(tiny.BUILTIN)
    for text in vocabularies.TEXTS:
        assert read.tokenizer(text)["input_ids"] == ours(text)["input_ids"], text


def test_a_note_says_what_the_weights_were(small: Path, notes: Notes) -> None:
    model = loaded(small, "bfloat16")
    assert {tensor.dtype for tensor in model.model.state_dict().values()} == {torch.bfloat16}
    (note,) = notes.texts
    assert note.startswith(f"{small}: the weights of model.gguf are Q4_0 (7 tensors), F32 (3)")
    assert note.endswith("they are expanded to bfloat16")


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_weights_are_stored_in_the_dtype_of_the_recipe(small: Path, dtype: str, expected: torch.dtype) -> None:
    assert loaded(small, dtype).storage_dtype == expected


def test_metadata_of_another_model_is_refused(small: Path) -> None:
    rewritten(small, llama__block_count=2)
    words = refusal(small)
    assert "holds" in words
    assert "the model that its metadata describes has" in words


def test_divisors_that_are_not_llama_3s_are_refused(tmp_path: Path) -> None:
    out = exported(gguf_models.quantized("llama 3", tmp_path), "gguf", tmp_path / "out")
    file = alone(out, tmp_path / "alone")
    content = bytearray(file.read_bytes())
    (tensor,) = (each for each in gguf.GGUFReader(file).tensors if each.name == "rope_freqs.weight")
    struct.pack_into("<f", content, tensor.data_offset, 3.0)  # of the fastest pair, which Llama 3 leaves as it is
    file.write_bytes(content)
    assert "divisors (rope_freqs) that are not Llama 3's" in refusal(file)


def test_another_scaling_of_the_rotary_embedding_is_refused(small: Path) -> None:
    rewritten(small, llama__rope__scaling__type="longrope")
    assert "its rotary embedding is scaled as 'longrope'" in refusal(small)


# tokenizers


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_the_tokenizer_of_the_file_reads_texts_as_the_original(kind: str, native: Natives, tmp_path: Path) -> None:
    floats = tiny.copied(native.floats(), tmp_path / "float")
    ours = vocabularies.save(kind, floats)
    tiny.quantize(floats, tmp_path / "q", GRIDS["w4g32"])
    file = alone(exported(tmp_path / "q", "gguf", tmp_path / "out"), tmp_path / "alone")
    theirs = AutoTokenizer.from_pretrained(resolve(str(file)))
    for text in (vocabularies.TEXT, "12345 years", "don't", ""):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"], text


def test_an_unknown_way_to_split_text_is_refused_unless_the_tokenizer_lies_beside(small: Path) -> None:
    rewritten(small, tokenizer__ggml__pre="martian")
    words = refusal(small)
    assert "splits text as 'martian'" in words
    assert all(name in words for name in SPLITS.values())
    tiny.tokenizer().save_pretrained(small.parent)
    assert loaded(small).tokenizer("stones")["input_ids"] == tiny.tokenizer()("stones")["input_ids"]


# paths and files


def test_a_folder_with_one_file_is_that_file(small: Path) -> None:
    folder = resolve(str(small.parent))
    assert folder == resolve(str(small))
    assert source_of(folder) == small.resolve()
    assert read_config(folder)["quantization_config"] == {"quant_method": "gguf", "gguf_file": "model.gguf"}


def test_a_folder_with_several_files_lists_them(small: Path) -> None:
    (small.parent / "other.gguf").write_bytes(small.read_bytes())
    assert "holds 2 GGUF files: model.gguf, other.gguf; give the path of one of them" in refusal(small.parent)


def test_an_export_as_the_model_says_which_path_to_give(native: Natives) -> None:
    out = native.export("gguf", "w4g32")
    assert f"to read its GGUF file, give the path {out / 'model.gguf'}" in refusal(out)


def test_a_part_of_a_split_file_is_refused_with_what_to_do(small: Path) -> None:
    part = small.rename(small.parent / "model-00001-of-00002.gguf")
    assert "one of 2 parts of a split GGUF file; join them with llama.cpp's llama-gguf-split --merge" in refusal(part)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(small: Path, share: float) -> None:
    content = small.read_bytes()
    small.write_bytes(content[: int(share * len(content))])
    words = refusal(small)
    assert "truncated" in words or "is empty" in words
    assert "copy or download it again" in words


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "it is no GGUF file" in refusal(file)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert "GGUF of version 1" in refusal(file)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62))
    assert "is truncated or damaged" in refusal(file)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    assert "holds no tensors" in refusal(file)


def test_a_projector_of_pictures_is_refused(small: Path) -> None:
    rewritten(small, architecture="clip")
    assert "is the vision or audio projector of a multimodal model" in refusal(small)
    rewritten(small, architecture="llama", general__type="adapter")
    assert "no model by itself (general.type: adapter)" in refusal(small)


def test_an_architecture_that_is_not_read_is_refused_with_those_that_are(small: Path) -> None:
    rewritten(small, architecture="mamba")
    words = refusal(small)
    assert "mamba" in words
    assert all(name in words for name in READ)


def test_types_that_cannot_be_read_are_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dequantize(data: object, kind: object) -> object:
        raise NotImplementedError

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "dequantize", dequantize)
        words = refusal(small)
    assert "cannot dequantize; take a file of the model in another type" in words
    at = small.read_bytes().index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    content = bytearray(small.read_bytes())
    struct.pack_into("<I", content, at, 199)
    small.write_bytes(content)
    assert "is of type 199, which the package gguf does not know" in refusal(small)


def test_without_the_package_it_says_what_to_install(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.models.gguf_view.find_spec", lambda name: None)
    assert 'install it with: pip install "qtool-llm[gguf]"' in refusal(small)


def test_the_header_is_that_of_the_package(small: Path) -> None:
    reader, header = gguf.GGUFReader(small), gguf_header.read_header(small)
    assert [each.name for each in header.tensors] == [each.name for each in reader.tensors]
    assert [each.kind for each in header.tensors] == [each.tensor_type.name for each in reader.tensors]
    assert [each.shape for each in header.tensors] == [tuple(map(int, each.shape[::-1])) for each in reader.tensors]
    assert [each.num_weights for each in header.tensors] == [int(each.n_elements) for each in reader.tensors]
    for key, value in header.metadata.items():
        assert value is None or value == pytest.approx(reader.fields[key].contents()), key
