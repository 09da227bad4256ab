"""Every packaged recipe loads, says what it does and how to run it, and writes where no other one does."""

import re
import runpy
from pathlib import Path

import pytest

import qtool
from qtool.blocks.job import load_method
from qtool.config import files, recipe
from qtool.config.quant import TableGrid
from qtool.config.yaml_loader import parse

FOLDER = Path(qtool.__file__).parent / "recipes"
PATHS = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "tables")  # tables are sweeps
PAPERS = [path for path in PATHS if path.is_relative_to(FOLDER / "papers")]
GENERATOR = Path(__file__).parents[2] / "scripts" / "make_paper_recipes.py"


def name(path: Path) -> str:
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def test_none_is_forgotten() -> None:
    assert len(PATHS) == 21 + 7 + 61
    assert len([path for path in PAPERS if path.parent.name == "efficientqat"]) == 6 * 4 + 1
    assert len([path for path in PAPERS if path.parent.name == "lrqat"]) == 5 * 6
    assert len([path for path in PAPERS if path.parent.name == "peqa"]) == 6
    assert files.packaged() == {name(path): path for path in PATHS}


def test_each_as_yaml_is_the_same_recipe_without_defaults() -> None:
    for path in PATHS:
        checked = recipe.load(path, ["output.overwrite=true"])
        text = recipe.as_yaml(checked)
        again = recipe.check(recipe.Recipe, parse(text), name(path))
        assert again == recipe.load(path), name(path)
        assert "memory_budget" not in text


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_it_loads_and_opens_with_what_it_does_and_its_command(path: Path) -> None:
    checked = recipe.load(path)
    assert checked == recipe.load(name(path))
    what, command = path.read_text(encoding="utf-8").splitlines()[:2]
    assert re.fullmatch(r"# [A-Z].{20,100}\.", what)
    assert command == f"#   qtool {load_method(checked.method.name).command} {name(path)}"


# recipes of papers


def test_the_papers_recipes_are_what_their_table_makes() -> None:
    made = runpy.run_path(str(GENERATOR))["recipes"]()
    assert {path.relative_to(FOLDER / "papers"): path.read_text(encoding="utf-8") for path in PAPERS} == made


@pytest.mark.parametrize("path", PAPERS, ids=name)
def test_a_paper_s_recipe_says_its_grid_in_its_name_and_its_numbers_where_it_has_any(path: Path) -> None:
    checked = recipe.load(path)
    spec = checked.quant.spec_for("model.layers.0.mlp.up_proj")
    assert spec is not None
    short = spec.label().removesuffix(" asym")
    assert path.stem.endswith(f"-{short}")
    assert checked.method.name == {"peqa": "efficientqat"}.get(path.parent.name, path.parent.name)
    assert checked.eval is not None
    assert ("wikitext2",) in [each.tasks for each in checked.expected] or path.stem.startswith("mistral-7b")
    assert {task for each in checked.expected for task in each.tasks} <= set(checked.eval.tasks)
    lower = {each.metric: each.value for each in checked.expected if each.tasks != ("c4",)}
    assert 3 < lower.get("perplexity", 4) < 13
    assert 0.5 < lower.get("acc", lower.get("acc_norm", 0.6)) < 0.8


@pytest.mark.parametrize(("method", "models"), [("efficientqat", 6), ("lrqat", 5), ("peqa", 1)])
def test_fewer_bits_and_larger_groups_are_worse_in_the_papers(method: str, models: int) -> None:
    """A typing error in the generator's tables breaks this order."""
    rows: dict[str, dict[str, float]] = {}
    for path in PAPERS:
        expected = recipe.load(path).expected
        if path.parent.name == method and expected:
            model, _, label = path.stem.rpartition("-")
            rows.setdefault(model, {})[label] = expected[0].value
    order = ("w4g128", "w4pc", "w3g128", "w3pc", "w2g64", "w2g128", "w2pc")
    assert len(rows) == models
    for found in rows.values():
        values = [found[label] for label in order if label in found]
        assert values == sorted(values)


# all packaged recipes


def test_each_has_an_output_of_its_own() -> None:
    outputs = [recipe.load(path).output.path for path in PATHS]
    assert len(set(outputs)) == len(outputs)
    assert all(path.parts[0] == "out" for path in outputs)


def test_the_folder_at_the_top_is_the_packaged_one() -> None:
    top = Path(__file__).parents[2] / "recipes"
    assert sorted(top.resolve().rglob("*.yaml")) == sorted(path.resolve() for path in FOLDER.rglob("*.yaml"))


def test_recipes_of_our_own_give_the_tables_8_bits_and_those_of_papers_keep_them_float() -> None:
    """The tables of these models are more than a tenth of their weights; a budget chooses the width of its tables."""
    floats = {"gptq-mixed-3bits", "builtin-w8a8", "builtin-w4a8", "gptq-w8a8", "gptq-w4a8g64"}  # or exports for vLLM
    for path in PATHS:
        quant = recipe.load(path).quant
        if quant.blocks is not None:  # llama.cpp's own choice for tables; its mixture has it by itself
            assert recipe.load(path).gguf.grid == "k_m" or quant.embedding == TableGrid(grid="q6_k"), path.stem
            continue
        own = path.parent in (FOLDER, FOLDER / "models")
        if own and path.stem not in floats:
            assert quant.table_spec(quant.embedding) == quant.table_spec(TableGrid(num_bits=8)), path.stem
            assert quant.head == "same"
        else:
            assert (quant.embedding, quant.head) in {("float", "same"), ("float", "float")}, path.stem
