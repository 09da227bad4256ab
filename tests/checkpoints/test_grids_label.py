"""The label of a checkpoint's grids: linears first, then embedding and head, if they are packed."""

import pytest

from qtool.checkpoints.quantization_config import PackedTables, grids_label, section_of, tables_of
from qtool.config.quant import QuantSpec

W4, W2 = QuantSpec(num_bits=4, group_size=64), QuantSpec(num_bits=2, group_size=64, symmetric=False)
W8 = QuantSpec(num_bits=8, group_size=-1)
LINEARS = {"model.layers.0.q": W4, "model.layers.1.q": W4}
EMBEDDING, POSITIONS, HEAD = "model.embed", "model.wpe", "lm_head"


@pytest.mark.parametrize(
    ("tables", "specs", "label"),
    [
        (PackedTables(), {}, "w4g64"),
        (PackedTables((EMBEDDING,), {HEAD: EMBEDDING}), {EMBEDDING: W8}, "w4g64, embedding w8pc"),
        (PackedTables((EMBEDDING,)), {EMBEDDING: W4}, "w4g64, embedding w4g64"),
        (PackedTables((EMBEDDING, POSITIONS)), {EMBEDDING: W8, POSITIONS: W8}, "w4g64, embedding w8pc"),
        (PackedTables((EMBEDDING,), {}, HEAD), {EMBEDDING: W8, HEAD: W8}, "w4g64, embedding and head w8pc"),
        (PackedTables((EMBEDDING,), {}, HEAD), {EMBEDDING: W8, HEAD: W2}, "w4g64, embedding w8pc, head w2g64 asym"),
        (PackedTables((), {}, HEAD), {HEAD: W8}, "w4g64, head w8pc"),
        (
            PackedTables((EMBEDDING,)),
            {"model.layers.2.q": W2, EMBEDDING: W8},
            "mixed w4g64 w2g64 asym, embedding w8pc",
        ),
    ],
)
def test_tables_follow_the_linears(tables: PackedTables, specs: dict[str, QuantSpec], label: str) -> None:
    specs = LINEARS | specs
    assert grids_label(specs, tables) == label
    found = tables_of(section_of(specs, tables))
    assert found.head == tables.head, "a head is known by its place outside the blocks"
    assert grids_label(specs, found) == label
    assert set(found.linears(specs)) == {name for name in specs if ".layers." in name}


def test_rounded_activations_are_those_of_the_linears() -> None:
    rounded = {name: QuantSpec(num_bits=4, group_size=64, activations=8, kv_cache=4) for name in LINEARS}
    assert grids_label(rounded | {EMBEDDING: W8}, PackedTables((EMBEDDING,))) == "w4g64 a8 kv4, embedding w8pc"


def test_without_the_class_of_the_model_no_name_is_taken_for_a_head() -> None:
    specs = LINEARS | {HEAD: W8}
    assert tables_of(section_of(specs) | {"model_free": {"experts": {}}}).head == ""
    assert grids_label(specs) == "mixed w4g64 w8pc"
