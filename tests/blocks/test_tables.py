"""The rows that stand for all tokens have their second moments; packed embeddings are the nearest codes of searches."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tables, tiny
from helpers.methods import correlated_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qtool
from qtool.blocks import tables as blocks_tables
from qtool.blocks.job import Job
from qtool.blocks.tables import NUM_WINDOWS, WINDOWS_PER_BATCH, nearest, pack_embeddings, same_moment
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.pipelines import in_memory
from qtool.quant.affine import quantize
from qtool.quant.packed_embedding import PackedEmbedding
from qtool.quant.ranges import search_qparams

TABLE = "model.embed_tokens"


def joined(batches: list[Tensor]) -> Tensor:
    return torch.cat(batches).flatten(0, 1).double()


def moment(x: Tensor, y: Tensor) -> Tensor:
    return x.double().T @ y.double() / len(x)


# ------------------------------------------------------------------------------------------------- the head's inputs


@given(st.integers(1, 300), st.sampled_from([3, 32, 40]), st.integers(1, 5), st.integers(0, 99))
def test_few_rows_have_the_second_moments_of_all_tokens(tokens: int, channels: int, batches: int, seed: int) -> None:
    """Those of an input, of the other input, and between the two; also of fewer tokens than channels."""
    x = correlated_inputs(tokens, channels, seed)
    y = x + 0.1 * correlated_inputs(tokens, channels, seed + 50)
    made = same_moment(zip(x.chunk(batches), y.chunk(batches), strict=True))
    ours = [joined(each) for each in made]
    for i, one in enumerate((x, y)):
        for j, other in enumerate((x, y)):
            expected = moment(one, other)
            found = moment(ours[i], ours[j])
            assert float((found - expected).norm()) < 1e-5 * float(expected.norm()), (i, j)


def test_the_error_of_a_linear_is_that_on_all_tokens() -> None:
    x, change = correlated_inputs(500, 48), torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).double()
    (made,) = same_moment(iter([(x,)]))
    rows = joined(made)
    expected = float((x.double() @ change.T).square().mean())
    assert float((rows @ change.T).square().mean()) == pytest.approx(expected, rel=1e-6)


def test_rows_are_batches_of_windows_that_are_always_the_same() -> None:
    x = correlated_inputs(200, 40)
    first, again = (same_moment(iter([(x[:90],), (x[90:],)]))[0] for _ in range(2))
    assert [len(batch) for batch in first] == [WINDOWS_PER_BATCH] * (NUM_WINDOWS // WINDOWS_PER_BATCH)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert {batch.shape[2] for batch in first} == {40}
    (whole,) = same_moment(iter([(x,)]))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(first, whole, strict=True)), "the batches do not matter"


def test_each_batch_stands_for_all_tokens() -> None:
    """No batch has the whole of a direction: each has a share of what every direction carries."""
    (made,) = same_moment(iter([(correlated_inputs(400, 64),)]))
    energies = torch.tensor([float(batch.square().sum()) for batch in made])
    assert float(energies.max() / energies.min()) < 4


# ------------------------------------------------------------------------------------------------------- embeddings


def test_a_packed_embedding_has_the_nearest_codes_of_searched_ranges(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are searched at once."""
    quant = tables.config(embedding={"num_bits": 3, "group_size": 16, "symmetric": False})
    weight = llama.model.get_parameter(f"{TABLE}.weight").detach().clone()
    target = Job.select(llama, quant).tables.embeddings[0]
    grid = search_qparams(weight, target.spec)
    expected = quantize(weight, *grid, target.spec)
    for rows in (1, 7, 1000):
        monkeypatch.setattr(blocks_tables, "ROWS_AT_ONCE", rows * weight.shape[1])
        found = nearest(target, torch.device("cpu"))
        assert torch.equal(found.codes, expected)
        assert torch.equal(found.scale, grid[0])
        assert torch.equal(found.zero_point, grid[1])


def test_packing_keeps_the_float_modules_and_measures_the_error(tmp_path: Path) -> None:
    loaded = tiny.load(tiny.llama(tmp_path / "m", tied=True))
    before = {name: loaded.model.get_submodule(name) for name in (TABLE, "lm_head")}
    job = pack_embeddings(Job.select(loaded, tables.config()))
    assert {name: module is before[name] for name, module in job.tables.floats.items()} == dict.fromkeys(before, True)
    assert 0 < job.tables.errors[TABLE] < 1e-3
    plain = Job.select(tiny.load(tmp_path / "m"), QuantConfig(group_size=16))
    assert pack_embeddings(plain).tables == plain.tables


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_streamed_and_whole_models_get_the_same_tables(tmp_path: Path, dtype: str, streamed: bool) -> None:
    folder = tiny.llama(tmp_path / "m", dtype=torch.bfloat16, tied=True)
    found = []
    for kind, whole in ((dtype, not streamed), ("float32", True)):
        loaded = load_model(ModelConfig(path=str(folder), dtype=kind, device="cpu"), streamed=not whole)
        pack_embeddings(Job.select(loaded, tables.config()))
        layer = loaded.model.get_submodule(TABLE)
        assert isinstance(layer, PackedEmbedding)
        assert layer(torch.tensor([1])).dtype == getattr(torch, kind)
        found.append(layer.quantized)
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].scale, found[1].scale)


# -------------------------------------------------------------------------------------------------- models in memory


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    ("method", "dtype"),
    [("rtn", torch.float16), ("gptq", torch.float32), ("gptq", torch.float16), ("lsq", torch.float32)],
)
def test_a_model_in_memory_gets_packed_tables_and_saves_them(
    tie: bool, method: str, dtype: torch.dtype, tmp_path: Path, tokens: Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny.llama(tmp_path / "m", tied=tie, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    keys = {"steps": 2, "batch_size": 2} if method == "lsq" else {}
    quant = {"num_bits": 4, "group_size": 16, "embedding": {"num_bits": 8}}
    result = qtool.quantize_model(model, None, method={"name": method, **keys}, quant=quant, data=tokens)
    assert set(tables.tied(model)) == ({"lm_head"} if tie else set())
    assert ("lm_head" in packed_linears(model)) != tie
    assert {TABLE} <= set(result.weight_errors)
    assert 0 < result.weight_errors[TABLE] < 1e-3
    logits = tiny.logits(model)
    assert logits.dtype == dtype
    model.save_pretrained(tmp_path / "out")
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert torch.equal(tiny.logits(restored), logits)
    with pytest.raises(qtool.InputError, match="already, so this model was quantized before"):
        qtool.quantize_model(model, None, method={"name": "rtn"}, quant=quant)


def test_a_head_that_is_refused_leaves_a_model_in_memory_as_it_was(make_llama: Callable[[], LoadedModel]) -> None:
    loaded = make_llama()
    state = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    quant: dict[str, Any] = {"group_size": 16, "embedding": {"num_bits": 8}, "head": {"group_size": 48}}
    with pytest.raises(qtool.InputError, match=r"^quant\.head: "):
        qtool.quantize_model(loaded.model, None, method={"name": "rtn"}, quant=quant)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())
    assert not tables.packed(copy.deepcopy(loaded.model))
    assert in_memory.in_memory(loaded.model, None)
