"""``gguf.grid: k_m``: the mixtures of llama.cpp as grids that methods round to."""

from collections import Counter
from pathlib import Path

import pytest
from helpers import tiny
from helpers.notes import Notes

from qtool.allocation import k_mixture
from qtool.allocation.k_mixture import Place, grid_of
from qtool.config import recipe as recipes
from qtool.config.grids import MIXED_GRIDS
from qtool.config.recipe import Recipe
from qtool.models.targets import select_targets
from qtool.system import progress
from qtool.system.errors import InputError


def recipe(path: Path | str, **quant: object) -> Recipe:
    raw = {"model": {"path": str(path)}, "method": {"name": "rtn"}, "quant": {"grid": "q4_k", **quant}}
    return recipes.check(Recipe, {**raw, "gguf": {"grid": "k_m"}, "output": {"path": "out"}}, "the recipe")


def test_the_favoured_blocks_are_those_of_llama_cpp() -> None:
    """``i < n/8 || i >= 7n/8 || (i - n/8) % 3 == 2`` for 32 blocks, as Q4_K_M files of Llama models show."""
    favoured = [i for i in range(32) if Place(i, 32, 1).favoured]
    assert favoured == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert grid_of("q4_k", "model.layers.0.self_attn.v_proj", Place(0, 32, 4)) == "q6_k"
    assert grid_of("q4_k", "model.layers.4.mlp.down_proj", Place(4, 32, 4)) == "q4_k"
    assert grid_of("q2_k", "model.layers.4.self_attn.v_proj", Place(4, 32, 4)) == "q4_k"
    assert grid_of("q2_k", "model.layers.4.self_attn.o_proj", Place(4, 32, 4)) == "q3_k"
    assert grid_of("q3_k", "model.layers.1.self_attn.v_proj", Place(1, 32, 4)) == "q5_k"
    assert grid_of("q3_k", "model.layers.2.mlp.down_proj", Place(2, 32, 4)) == "q4_k"
    assert grid_of("q3_k", "transformer.h.3.attn.c_attn", Place(3, 32, 1)) == "q4_k"
    assert grid_of("q5_k", "model.layers.31.mlp.up_proj", Place(31, 32, 4)) == "q5_k"


@pytest.mark.parametrize("base", MIXED_GRIDS)
def test_methods_get_the_grids_of_the_mixture(base: str) -> None:
    loaded = tiny.load(tiny.BUILTIN)
    quant = k_mixture.quant_of(recipe(tiny.BUILTIN, grid=base), loaded)
    grids = Counter[str](target.spec.grid for target in select_targets(loaded, quant))
    assert grids[base] == max(grids.values())
    assert len(grids) > 1
    assert getattr(quant.embedding, "grid", "") == "q6_k"


def test_the_recipes_own_grids_win() -> None:
    loaded = tiny.load(tiny.BUILTIN)
    own = recipe(tiny.BUILTIN, overrides={"*.v_proj": {"grid": "q5_k"}}, embedding="float")
    quant = k_mixture.quant_of(own, loaded)
    assert {t.spec.grid for t in select_targets(loaded, quant) if t.name.endswith("v_proj")} == {"q5_k"}
    assert quant.embedding == "float"


def test_rows_that_blocks_do_not_divide_get_smaller_blocks(tmp_path: Path) -> None:
    loaded = tiny.load(tiny.llama(tmp_path / "float"))
    with progress.use(notes := Notes()):
        quant = k_mixture.quant_of(recipe(tmp_path / "float"), loaded)
    labels = Counter(target.spec.label() for target in select_targets(loaded, quant))
    assert set(labels) == {"q4_1", "w8g32"}
    assert "which blocks of 256 do not divide" in notes.texts[0]


def test_what_has_no_mixture_is_refused() -> None:
    with pytest.raises(InputError, match=r"gguf.grid: k_m makes a mixture around a grid, and quant.grid is q6_k"):
        recipe(tiny.BUILTIN, grid="q6_k")
    with pytest.raises(InputError, match="a budget chooses num_bits, and grid: q4_k has one width"):
        recipe(tiny.BUILTIN, budget={"average_bits": 4})
