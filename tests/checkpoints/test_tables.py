"""Checkpoints with packed tables: bytes are the formula's, and every way of loading gives the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tables, tiny
from helpers.tables import config
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qtool.blocks.job import Job
from qtool.checkpoints import native
from qtool.checkpoints.native import NativeCheckpoint
from qtool.checkpoints.quantization_config import section_of, specs_of, tables_of
from qtool.checkpoints.sizes import packed_parts
from qtool.config.sections import ModelConfig
from qtool.models.linears import packed_linears
from qtool.models.loading import load_model
from qtool.quant.affine import dequantize
from qtool.quant.packed_embedding import PackedEmbedding, TiedLinear
from qtool.quant.packed_weight import FORMAT_VERSION, TABLES_VERSION
from qtool.system.errors import InputError, RunError

HEAD, TABLE = "lm_head", "model.embed_tokens"
QUANT = config(embedding={"num_bits": 4, "group_size": 16, "symmetric": False})


@pytest.fixture(params=["tied", "untied", "gpt2", "opt", "half"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    """The job of a model that was rounded to nearest with packed tables."""
    kind = request.param
    if kind in ("gpt2", "opt"):
        folder = tiny.FAMILIES[kind](tmp_path / "float")
    else:
        folder = tiny.llama(tmp_path / "float", tied=kind != "untied")
    dtype = "bfloat16" if kind == "half" else "float32"
    return tables.run("rtn", load_model(ModelConfig(path=str(folder), dtype=dtype, device="cpu")), QUANT)[0]


@pytest.fixture
def folder(job: Job, tmp_path: Path) -> Path:
    return tables.written(job, tmp_path / "packed")


def dtype_of(job: Job) -> torch.dtype:
    return job.loaded.dtype


def bits(model: Any) -> dict[str, torch.Tensor]:
    """Return the codes, scales and zero points of all packed weights of a model by name."""
    found = {**packed_linears(model), **tables.packed(model)}
    return {f"{n}.{part}": tensor for n, layer in found.items() for part, tensor in layer.state_dict().items()}


def same_bits(ours: Any, theirs: Any) -> bool:
    one, other = bits(ours), bits(theirs)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------- on disk


def test_the_bytes_of_a_table_are_those_of_the_formula(job: Job, folder: Path) -> None:
    stored = tiny.stored(folder)
    source = NativeCheckpoint(folder)
    for name, spec in job.tables.specs.items():
        shape = job.tables.shapes[name]
        parts = packed_parts(name, spec, shape)
        found = {
            each: tensor for each, tensor in stored.items() if each.rpartition(".")[0] == name and "bias" not in each
        }
        assert {each: (t.dtype, t.shape) for each, t in found.items()} == {
            each: (t.dtype, t.shape) for each, t in parts.items()
        }
        counted = sum(t.nbytes for each, t in found.items() if each.rpartition("_")[2] in ("packed", "scale", "point"))
        if shape[0] % 32 == 0:  # otherwise the zero points of a group end within a word
            assert 8 * counted / (shape[0] * shape[1]) == pytest.approx(spec.bits_per_weight(shape[1]), rel=1e-12)
        assert source.shapes[name] == shape
    for head in job.tables.tied:
        assert not [name for name in stored if name.startswith(f"{head}.weight")]


def test_the_config_lists_embeddings_and_heads(job: Job, folder: Path) -> None:
    whole = json.loads((folder / "config.json").read_text())
    section = whole["quantization_config"]
    assert section["format_version"] == TABLES_VERSION
    assert section["embeddings"] == [target.name for target in job.tables.embeddings]
    assert section["tied"] == dict(job.tables.tied)
    assert not set(section["linears"]) & set(section["embeddings"])
    specs = {target.name: target.spec for target in job.targets} | job.tables.specs
    assert specs_of(section) == specs
    assert NativeCheckpoint(folder).tables == tables_of(section) == native.as_listed(job.tables)
    assert whole["tie_word_embeddings"] == bool(job.tables.tied)


def test_a_checkpoint_without_packed_embeddings_is_as_before(tmp_path: Path) -> None:
    loaded = tiny.quantize(tiny.llama(tmp_path / "m"), tmp_path / "out", config(embedding="float"))
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["format_version"] == FORMAT_VERSION
    assert not {"embeddings", "tied"} & set(section)
    assert section == section_of(tiny.specs(loaded))


def test_the_checkpoint_holds_what_is_in_memory(job: Job, folder: Path) -> None:
    source = NativeCheckpoint(folder)
    for target in job.tables.embeddings:
        layer = job.loaded.model.get_submodule(target.name)
        assert isinstance(layer, PackedEmbedding)
        assert torch.equal(dequantize(*source.quantized(target.name)), layer.dequantized())


# ------------------------------------------------------------------------------------------------------- loading


def test_loading_saving_and_loading_again_change_no_bit(job: Job, folder: Path, tmp_path: Path) -> None:
    logits = tiny.logits(job.loaded.model)
    first = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_of(job))
    assert same_bits(first, job.loaded.model)
    assert torch.equal(tiny.logits(first), logits)
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype_of(job))
    assert same_bits(second, first)
    assert torch.equal(tiny.logits(second), logits)
    assert tables.tied(second).keys() == job.tables.tied.keys()
    for name, head in tables.tied(second).items():
        assert head.table is second.get_submodule(job.tables.tied[name])
    assert tiny.stored(tmp_path / "again").keys() == tiny.stored(folder).keys()


@pytest.mark.parametrize("job", ["tied", "untied"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_a_dtype_changes_no_code_and_no_scale(job: Job, folder: Path, dtype: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert same_bits(model, job.loaded.model)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert tiny.logits(model).dtype == expected
    for layer in tables.packed(model).values():
        assert layer.weight.dtype == expected
        assert torch.equal(layer(torch.arange(9)), layer.dequantized(expected)[:9])
    for head in tables.tied(model).values():
        assert head.weight.dtype == expected


@pytest.mark.parametrize("job", ["tied", "untied", "gpt2"], indirect=True)
def test_auto_model_loads_the_tables_without_a_head(job: Job, folder: Path) -> None:
    model = AutoModel.from_pretrained(folder, dtype=dtype_of(job))
    ours = [*tables.packed(model).values()]
    theirs = [*tables.packed(job.loaded.model).values()]
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a.dequantized(), b.dequantized()) for a, b in zip(ours, theirs, strict=True))
    hidden = model.eval()(tiny.probe()).last_hidden_state
    whole = job.loaded.model(tiny.probe(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden, whole)


@pytest.mark.parametrize("job", ["tied", "untied"], indirect=True)
def test_a_device_map_loads_the_same_bits(job: Job, folder: Path) -> None:
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"})
    assert same_bits(model, job.loaded.model)
    assert torch.equal(tiny.logits(model), tiny.logits(job.loaded.model))


@pytest.mark.parametrize("job", ["tied", "untied"], indirect=True)
def test_state_dicts_of_two_models_are_exchanged(job: Job, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for layer in tables.packed(model).values():
            layer.weight_packed.zero_()
    assert not same_bits(model, job.loaded.model)
    missing, unexpected = model.load_state_dict(job.loaded.model.state_dict())
    assert (missing, unexpected) == ([], [])
    assert same_bits(model, job.loaded.model)
    assert torch.equal(tiny.logits(model), tiny.logits(job.loaded.model))


def test_a_packed_table_is_not_resized(job: Job, folder: Path) -> None:
    for model in (job.loaded.model, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_of(job))):
        with pytest.raises(InputError, match="is packed and cannot be resized; resize the float model"):
            model.resize_token_embeddings(tiny.VOCABULARY + 8)


def test_text_is_written_with_a_cache(job: Job, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_of(job))
    prompt = tiny.probe()[:, :8]
    assert torch.equal(tiny.continued(model, prompt, 6), tiny.continued(job.loaded.model, prompt, 6))


def test_a_loaded_checkpoint_is_what_qtool_itself_loads(job: Job, folder: Path) -> None:
    loaded = load_model(ModelConfig(path=str(folder), dtype=str(dtype_of(job))[6:], device="cpu"), quantized=True)
    assert torch.equal(tiny.logits(loaded.model), tiny.logits(job.loaded.model))
    assert loaded.num_embeddings == tiny.VOCABULARY


@pytest.mark.parametrize("tie", [True, False])
def test_the_bias_of_a_head_is_kept(tie: bool, tmp_path: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
    model = PhiForCausalLM(PhiConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=tie))
    with torch.no_grad():
        model.lm_head.bias.normal_()
    model.save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    job, _ = tables.run("rtn", tiny.load(tmp_path / "m"), QUANT)
    bias = model.lm_head.bias.detach()
    folder = tables.written(job, tmp_path / "out")
    restored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    restored.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    for each in (job.loaded.model, restored, again):
        head = each.get_output_embeddings()
        assert isinstance(head, TiedLinear) == tie
        assert torch.equal(head.bias, bias)
        assert torch.equal(tiny.logits(each), tiny.logits(job.loaded.model))


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("job", ["tied"], indirect=True)
def test_a_checkpoint_that_lists_what_is_no_embedding_is_refused(folder: Path) -> None:
    file = folder / "config.json"
    whole = json.loads(file.read_text())
    section = whole["quantization_config"]
    for change, message in (
        ({"embeddings": ["model.norm"], "linears": section["linears"]}, r"lists model\.norm, which is no embedding of"),
        ({"linears": [*section["linears"], TABLE], "embeddings": [], "tied": {}}, r"embed_tokens"),
    ):
        file.write_text(json.dumps(whole | {"quantization_config": section | change}))
        with pytest.raises((InputError, RunError), match=message):
            AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("job", ["tied"], indirect=True)
def test_codes_that_do_not_fit_their_grid_are_refused(folder: Path) -> None:
    tiny.change(folder, **{"model__embed_tokens__weight_scale": torch.ones(2, 2, dtype=torch.float16)})
    with pytest.raises((InputError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight_scale is torch\.float16 \[2, 2\]; its grid"):
        NativeCheckpoint(folder).quantized(TABLE)


def test_a_loader_that_does_not_know_qtool_stops(tmp_path: Path) -> None:
    """The table's one number has another shape than the table, so nothing random is computed with."""
    job, _ = tables.run("rtn", tiny.load(tiny.llama(tmp_path / "float", tied=True)), QUANT)
    folder = tables.written(job, tmp_path / "out")
    config_file = folder / "config.json"
    whole = json.loads(config_file.read_text())
    del whole["quantization_config"]
    config_file.write_text(json.dumps(whole))
    with pytest.raises(RuntimeError, match=r"(?s)size mismatch|mismatch"):
        LlamaForCausalLM.from_pretrained(folder, config=LlamaConfig(**whole))
