"""Packed embeddings: expanding the rows that are read is reading rows of the expanded table, in every class."""

import copy
from typing import Any

import pytest
import torch
from helpers.tables import random_ids
from helpers.weights import Case, cases, rounded_to_nearest, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from qtool.config.quant import BITS, QuantSpec
from qtool.quant.affine import dequantize
from qtool.quant.packed_embedding import PackedEmbedding, TiedLinear, can_stand_for
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.packing import num_words, pack, unpack, unpack_at

W8 = QuantSpec(num_bits=8, group_size=-1)


def embedding(case: Case, kind: type[nn.Embedding] = nn.Embedding, **keys: Any) -> nn.Embedding:
    module = kind(*case.weight.shape, **keys)
    module.weight = nn.Parameter(case.weight, requires_grad=False)
    return module


def filled(case: Case, module: nn.Embedding | None = None) -> PackedEmbedding:
    """Return the packed embedding of a case, with the class of ``module``."""
    layer = PackedEmbedding.like(module or embedding(case), case.spec)
    layer.fill(rounded_to_nearest(*case))
    return layer


# --------------------------------------------------------------------------------------------------- reading rows


@given(st.sampled_from(BITS), st.integers(1, 90), st.integers(1, 4), st.integers(1, 30), st.integers(0, 999))
def test_codes_read_at_places_of_a_column_are_those_of_the_unpacked_column(
    bits: int, rows: int, columns: int, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    words = pack(codes.T.contiguous(), bits).T.contiguous()
    assert words.shape == (num_words(rows, bits), columns)
    assert torch.equal(unpack(words.T.contiguous(), bits, rows).T, codes)
    for index in (random_ids(count, rows=rows, seed=seed), torch.arange(rows), torch.tensor([rows - 1, 0])):
        assert torch.equal(unpack_at(words, bits, index), codes[index])


@pytest.mark.parametrize("bits", BITS)
def test_all_ones_are_read_from_words_whose_sign_is_set(bits: int) -> None:
    codes = torch.full((40, 1), 2**bits - 1, dtype=torch.uint8)
    words = pack(codes.T.contiguous(), bits).T.contiguous()
    assert bool((words < 0).any())
    assert torch.equal(unpack_at(words, bits, torch.arange(40)), codes)


@given(cases(-3, 2), st.integers(0, 999), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_rows_expanded_are_rows_of_the_expanded_table(case: Case, seed: int, dtype: torch.dtype) -> None:
    """This holds for every grid, for rows in any order and shape, repeated ones included, and for none."""
    layer = filled(case)
    table = dequantize(*layer.quantized).to(dtype)
    assert torch.equal(layer.dequantized(dtype), table)
    for shape in ((7,), (2, 3), (1, 2, 2), (), (0,)):
        ids = random_ids(*shape, rows=len(table), seed=seed)
        assert torch.equal(layer.dequantized(dtype, ids.flatten()), table[ids.flatten()])
        layer.mark(dtype)
        out = layer(ids)
        assert out.dtype == dtype
        assert torch.equal(out, nn.functional.embedding(ids, table))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_that_has_no_row_is_an_error(symmetric: bool) -> None:
    """As in a float embedding: a negative number does not count from the end, and bytes are no mask of rows."""
    spec = QuantSpec(num_bits=4, group_size=16, symmetric=symmetric)
    layer = filled(Case(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)), spec))
    for wrong in (torch.tensor([-1]), torch.tensor([40]), torch.tensor([1], dtype=torch.uint8)):
        with pytest.raises((IndexError, RuntimeError)):
            layer(wrong)


@given(cases(-3, 2))
def test_a_packed_embedding_keeps_codes_scales_and_zero_points(case: Case) -> None:
    assert same(filled(case).quantized, rounded_to_nearest(*case))


@given(cases(-3, 2))
def test_a_packed_embedding_survives_its_state_dict_and_a_change_of_precision(case: Case) -> None:
    layer = filled(case)
    fresh = PackedEmbedding.like(embedding(case), case.spec)
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        nn.Sequential(fresh).to(dtype)
        assert fresh(torch.tensor([0])).dtype == dtype
        assert same(fresh.quantized, layer.quantized)
    fresh.check("table")


# --------------------------------------------------------------------------------------------- the model's own class


TABLE = Case(torch.randn(40, 16, generator=torch.Generator().manual_seed(5)), W8)


@pytest.mark.parametrize(
    ("kind", "keys", "rows"),
    [
        (nn.Embedding, {"padding_idx": 3}, 40),
        (Gemma3TextScaledWordEmbedding, {"padding_idx": 0, "embed_scale": 8.0}, 40),
        (OPTLearnedPositionalEmbedding, {}, 38),  # it adds rows for its offset
    ],
)
def test_a_packed_embedding_computes_as_the_class_that_it_stands_for(
    kind: Any, keys: dict[str, Any], rows: int
) -> None:
    """It has the class and the attributes: Gemma's scale, OPT's offset of positions, the token of padding."""
    module = kind(rows, 16, **keys)
    module.weight = nn.Parameter(TABLE.weight, requires_grad=False)
    assert can_stand_for(module)
    layer = filled(TABLE, module)
    assert isinstance(layer, kind)
    assert {name: value for name, value in vars(layer).items() if name in vars(module) and name[0] != "_"} == {
        name: value for name, value in vars(module).items() if name[0] != "_"
    }
    module.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
    ids = torch.ones(2, 5, dtype=torch.int64) if kind is OPTLearnedPositionalEmbedding else random_ids(2, 5, rows=40)
    assert torch.equal(layer(ids), module(ids))
    assert not torch.equal(layer(ids), nn.functional.embedding(ids, layer.dequantized())) or kind is nn.Embedding
    assert type(copy.deepcopy(layer)) is type(layer)
    assert [*PackedEmbedding.like(module, W8).state_dict()] == [*layer.state_dict()]


def test_a_packed_embedding_leaves_the_module_that_it_stands_for_as_it_was() -> None:
    module = Gemma3TextScaledWordEmbedding(40, 16, 0, 8.0)
    state, attributes = [*module.state_dict()], set(vars(module))
    PackedEmbedding.like(module, W8)
    assert [*module.state_dict()] == state
    assert set(vars(module)) == attributes
    assert isinstance(module.weight, nn.Parameter)


class _Own(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return self.weight[input] * 2


class _Other(nn.Embedding):
    def forward(self, input: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]  # as some models have it
        return super().forward(input) + more


@pytest.mark.parametrize("module", [_Own(40, 16), _Other(40, 16), nn.Embedding(40, 16, max_norm=1.0)])
def test_a_class_that_reads_the_table_in_its_own_way_is_known(module: nn.Embedding) -> None:
    """The last changes rows when it reads them."""
    assert not can_stand_for(module)


# --------------------------------------------------------------------------------------------------- the tied head


@given(cases(-3, 2), st.booleans())
def test_a_tied_head_is_a_linear_with_the_weight_of_the_embedding(case: Case, has_bias: bool) -> None:
    layer = filled(case)
    bias = nn.Parameter(torch.linspace(-1, 1, len(case.weight)), requires_grad=False) if has_bias else None
    head, linear = TiedLinear(layer, bias), PackedLinear.from_quantized(layer.quantized, bias)
    x = torch.randn(3, case.weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(x), linear(x))
    assert head.weight_packed is layer.weight_packed
    assert [*head.state_dict()] == (["bias"] if has_bias else [])
    assert not list(head.buffers())


def test_both_readers_follow_a_table_that_is_loaded_moved_or_copied() -> None:
    layer = filled(TABLE)
    model = nn.ModuleDict({"table": layer, "head": TiedLinear(layer)})
    other = filled(Case(TABLE.weight.flip(0), W8))
    model.load_state_dict(nn.ModuleDict({"table": other, "head": TiedLinear(other)}).state_dict())
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        table, head = each["table"], each["head"]
        assert isinstance(table, PackedEmbedding)
        assert isinstance(head, TiedLinear)
        assert head.table is table
        assert same(head.quantized, other.quantized)
    assert model["head"](torch.eye(16)).dtype == torch.float32
    assert layer.weight_packed is not other.weight_packed
