"""What it costs to round embeddings and heads: against definitions, computed by the model itself."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.architectures import write
from helpers.bit_plans import TABLE, budgeted
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.allocation.plan import units_of
from qtool.allocation.rounded import compensated, nearest, rounded_unit
from qtool.allocation.sensitivity import COST_ESTIMATORS, Costs, measure_costs
from qtool.allocation.tables import frequencies
from qtool.allocation.units import Unit
from qtool.blocks.job import Job
from qtool.blocks.tables import pack_embeddings
from qtool.config.quant import QuantConfig
from qtool.methods import gptq
from qtool.models.linears import packed_linears, weight_of
from qtool.models.loaded import LoadedModel
from qtool.models.tables import embeddings_of
from qtool.quant.affine import dequantize
from qtool.quant.packed_embedding import PackedEmbedding

QUANT = QuantConfig(group_size=32, embedding=TABLE)
Load = Callable[[str], LoadedModel]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a model with an untied head, one with a tied table, one with positions, and one that scales rows."""
    folder, float32 = tmp_path_factory.mktemp("models"), torch.float32
    return {
        "untied": tiny.llama(folder / "untied", dtype=float32),
        "tied": tiny.llama(folder / "tied", dtype=float32, tied=True),
        "positions": tiny.gpt2(folder / "positions"),
        "scaled": write("gemma3_text", folder / "scaled"),
    }


@pytest.fixture
def load(folders: dict[str, Path]) -> Load:
    return lambda name: tiny.load(folders[name])


@pytest.fixture
def every_row() -> Tensor:
    """Tokens ``[10, 64]`` in which each of the 320 of the vocabulary occurs twice."""
    return torch.randperm(2 * tiny.VOCABULARY, generator=torch.Generator().manual_seed(5)).view(10, 64) // 2


def units(loaded: LoadedModel) -> list[Unit]:
    return units_of(loaded, budgeted(QUANT.model_copy(update={"group_size": 16}), average_bits=8.9))


def costs(loaded: LoadedModel, tokens: Tensor, estimator: str) -> tuple[list[Unit], Costs]:
    """Return all units and their costs, rounded to nearest."""
    found = units(loaded)
    config = budgeted(average_bits=8.9, estimator=estimator, rounding="nearest").budget
    assert config is not None
    return found, measure_costs(Job(loaded, (), tokens), found, config)


@pytest.mark.parametrize("estimator", COST_ESTIMATORS)
@pytest.mark.parametrize("name", ["untied", "tied", "positions"])
def test_more_bits_cost_less_and_the_model_stays_what_it_was(
    estimator: str, name: str, load: Load, tokens: Tensor
) -> None:
    loaded = load(name)
    before = copy.deepcopy(loaded.model.state_dict())
    tables = by_table(loaded, tokens, estimator)
    assert tables.keys() == ({"embedding", "head"} if name == "untied" else {"embedding"})
    assert all(c[2] > c[3] > c[4] > c[8] > 0 for c in tables.values())
    after = loaded.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad or p.grad is not None for p in loaded.model.parameters())
    assert not any(module._forward_hooks for module in loaded.model.modules())


@pytest.mark.parametrize("estimator", COST_ESTIMATORS)
def test_a_head_with_a_planted_weakness_costs_more_and_the_embedding_does_not(
    estimator: str, load: Load, tokens: Tensor
) -> None:
    """One channel of the head is far larger than the others, and the norm before it makes up for that."""
    loaded = load("untied")
    before = by_table(loaded, tokens, estimator)
    for name, factor in (("lm_head", 30), ("model.norm", 1 / 30)):
        weight = weight_of(loaded.model.get_submodule(name))
        scaled = weight.data.clone()  # a weight lies in a mapped file, whose pages may be dropped
        scaled[..., 3] *= factor
        weight.data = scaled
    after = by_table(loaded, tokens, estimator)
    assert after["head"][4] > 2 * before["head"][4]
    assert after["embedding"][4] == pytest.approx(before["embedding"][4], rel=0.01)


def by_table(loaded: LoadedModel, tokens: Tensor, estimator: str) -> dict[str, dict[int, float]]:
    """Return the costs of the tables alone."""
    pairs = zip(*costs(loaded, tokens, estimator), strict=True)
    return {unit.table: cost for unit, cost in pairs if unit.table}


def outputs(loaded: LoadedModel, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the output of each embedding, the hidden states that enter the head, and the logits."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: found.__setitem__(name, out))
        for name, module in embeddings_of(loaded.model).items()
    ]
    head = loaded.model.get_output_embeddings()
    assert head is not None
    hooks.append(head.register_forward_pre_hook(lambda _, args: found.__setitem__("head", args[0])))
    with torch.no_grad():
        logits = loaded.model(tokens).logits
    for hook in hooks:
        hook.remove()
    return found, found.pop("head"), logits


@pytest.mark.parametrize("name", ["untied", "positions", "scaled"])
def test_hessian_of_embeddings_is_the_squared_error_of_their_outputs_per_token(
    name: str, load: Load, every_row: Tensor
) -> None:
    """The classes of two of these models shift or scale rows. Positions are read once for all windows."""
    loaded = load(name)
    found, measured = costs(loaded, every_row, "hessian")
    unit = found[0]
    before, read, _ = outputs(loaded, every_row)
    with rounded_unit(loaded, unit, 3) as changes:
        after = outputs(loaded, every_row)[0]
    expected = sum(float((after[n] - x).square().sum() / x.shape[:-1].numel()) for n, x in before.items())
    if unit.tied:
        expected += float(read.square().mean() * changes[unit.targets[0]].square().sum())
    assert measured[0][3] == pytest.approx(expected, rel=1e-3)


def test_hessian_of_a_head_is_the_trace_times_the_error(load: Load, tokens: Tensor) -> None:
    loaded = load("untied")
    found, measured = costs(loaded, tokens, "hessian")
    _, read, _ = outputs(loaded, tokens)
    error = nearest(found[-1].targets[0], 3) - found[-1].targets[0].weight
    assert measured[-1][3] == pytest.approx(float(read.square().mean() * error.square().sum()), rel=1e-3)


def test_block_of_tables_is_the_change_of_hidden_states_and_of_logits(load: Load, every_row: Tensor) -> None:
    loaded = load("untied")
    found, measured = costs(loaded, every_row, "block")
    before, read, logits = outputs(loaded, every_row)
    with rounded_unit(loaded, found[0], 3):
        after = outputs(loaded, every_row)[0]
    (embedding,) = before
    change = (after[embedding] - before[embedding]).square().sum() / before[embedding].square().sum()
    assert measured[0][3] == pytest.approx(float(change), rel=1e-3)
    changed = read @ nearest(found[-1].targets[0], 3).T
    assert measured[-1][3] == pytest.approx(float((changed - logits).square().sum() / logits.square().sum()), rel=1e-3)


@pytest.mark.parametrize("estimator", ["variance", "hessian", "block"])
def test_a_tied_table_costs_what_embedding_and_head_cost_that_share_no_table(
    estimator: str, load: Load, tokens: Tensor
) -> None:
    tied, untied = load("tied"), load("untied")
    for name, value in tied.model.state_dict().items():
        untied.model.get_parameter(name).data = value.clone()
    both, one = by_table(untied, tokens, estimator), by_table(tied, tokens, estimator)["embedding"]
    for bits in (2, 3, 4, 8):
        assert one[bits] == pytest.approx(both["embedding"][bits] + both["head"][bits], rel=1e-5)


def test_rows_that_the_text_reads_more_often_count_more(load: Load) -> None:
    loaded, often = load("untied"), torch.tensor([[7] * 20 + [9] * 4] * 3)
    weight = weight_of(loaded.model.get_submodule("model.embed_tokens"))
    float_rows, growth = weight.data, {}
    for row in (7, 9):
        weight.data = float_rows.clone()
        weight.data[row] *= 10
        growth[row] = by_table(loaded, often, "hessian")["embedding"][4]
    assert growth[7] > 4 * growth[9]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_frequencies_are_those_of_the_text_and_leave_a_share_for_what_it_did_not_read(counts: list[int]) -> None:
    found, given_counts = frequencies(torch.tensor(counts)), torch.tensor(counts)
    assert float(found.sum()) == pytest.approx(1, rel=1e-5)
    assert bool((found > 0).all())
    unseen, once = given_counts == 0, max(int((given_counts == 1).sum()), 1)
    if unseen.any():
        assert float(found[unseen].sum()) == pytest.approx(once / (sum(counts) + once), rel=1e-5)
    seen = found[~unseen] / given_counts[~unseen]
    assert seen.numel() == 0 or float(seen.max()) == pytest.approx(float(seen.min()), rel=1e-5)


def test_compensated_tables_are_those_of_a_run(load: Load, tokens: Tensor) -> None:
    """The embedding that a run packs, and the head that GPTQ makes of the float model's inputs."""
    loaded, made = load("untied"), load("untied")
    found = units(loaded)
    weights = compensated(Job(loaded, tuple(t for unit in found[1:-1] for t in unit.targets), tokens), found)
    job = Job.select(made, QUANT, tokens)
    gptq.run(replace(job, targets=job.tables.of_method), gptq.Config())  # the head alone, before the embedding
    assert torch.equal(weights(found[-1].targets[0], 8), dequantize(*packed_linears(made.model)["lm_head"].quantized))
    pack_embeddings(job)
    table = made.model.get_submodule("model.embed_tokens")
    assert isinstance(table, PackedEmbedding)
    assert torch.equal(weights(found[0].targets[0], 8), table.dequantized())
