"""Values that no computation, name or file system can take are refused when the recipe is read."""

import os
from pathlib import Path
from typing import Any

import pytest

from qtool.allocation.plan import BitPlan
from qtool.config import catalog, plugins, recipe
from qtool.config.recipe import EvalRecipe, Recipe, check, resolved
from qtool.config.section import Section
from qtool.config.sweep import SweepConfig
from qtool.system.errors import InputError

BASE: dict[str, Any] = {"model": {"path": "m"}, "method": {"name": "rtn"}, "output": {"path": "out"}}


def refused(**changes: object) -> str:
    with pytest.raises(InputError) as caught:
        check(Recipe, BASE | changes, "r.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {"limit": 99999999999999999999}}, "eval.limit: should be less than 2147483648; found 9999"),
        ({"eval": {"limit": 2**31}}, "eval.limit: should be less than 2147483648"),
        ({"eval": {"batch_size": 10**12}}, "eval.batch_size: should be less than 2147483648"),
        ({"eval": {"num_fewshot": {"boolq": 10**12}}}, "eval.num_fewshot: should be less than 2147483648"),
        ({"data": {"num_samples": 10**13}}, "data.num_samples: should be less than 2147483648"),
        ({"data": {"num_samples": 2**30, "seq_len": 2**10}}, "data: num_samples times seq_len is 1,099,511,627,776"),
        ({"data": {"memory_budget": 2**63}}, "data.memory_budget: should be less than 9223372036854775808 bytes"),
        ({"seed": 2**32}, "seed: should be less than 4294967296"),
        ({"method": {"name": "gptq", "block_size": 2**31}}, "method.block_size: should be less than 2147483648"),
        ({"method": {"name": "gptq", "norm": float("inf")}}, "method.norm: should be a finite number"),
        ({"method": {"name": "gptq", "damp": float("nan")}}, "method.damp: should be a finite number"),
        ({"output": {"path": "a\0b"}}, "output.path: the text holds a NUL character"),
        ({"output": {"path": "\ud800"}}, "output.path: the text holds half of a surrogate pair"),
        ({"output": {"path": "~nosuchuser/x"}}, "output.path: this machine has no user nosuchuser"),
        ({"output": {"path": "$UNSET_HERE/x"}}, "output.path: the environment variable UNSET_HERE is not set"),
        ({"output": {"path": "x" * 241}}, "output.path: should have a name of at most 240 bytes"),
        ({"output": {"path": "."}}, "output.path: should be a folder with a name of its own"),
        ({"export": [{"format": "dense", "path": "a\0b"}]}, "export.0.path: the text holds a NUL character"),
        ({"data": {"source": "a\0b"}}, "data.source: the text holds a NUL character"),
        ({"model": {"path": "\udfff"}}, "model.path: the text holds half of a surrogate pair"),
        ({"eval": {"tasks": ["a\0"]}}, "eval.tasks: the text holds a NUL character"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_key(changes: dict[str, object], message: str) -> None:
    assert message in refused(**changes)


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "output.path: cannot be used as a path" in refused(output={"path": str(tmp_path / "loop")})


def test_the_largest_values_are_taken() -> None:
    found = check(Recipe, BASE | {"seed": 2**32 - 1, "eval": {"limit": 2**31 - 1}}, "r.yaml")
    assert (found.seed, found.eval and found.eval.limit) == (2**32 - 1, 2**31 - 1)


def sections() -> list[type[Section]]:
    return [Recipe, EvalRecipe, SweepConfig, *(plugins.get(name).config for name in catalog.methods())]


@pytest.mark.parametrize("section", sections(), ids=lambda kind: kind.__module__)
def test_every_whole_number_has_an_upper_limit(section: type[Section]) -> None:
    """Also those of later methods and keys: the check is in the base of all sections."""
    wanted = [name for name, field in section.model_fields.items() if field.annotation in (int, int | None)]
    for name in wanted:
        with pytest.raises(ValueError, match="less than"):
            section.__pydantic_validator__.validate_assignment(section.model_construct(), name, 2**40)


def test_a_plan_holds_the_sizes_of_large_models() -> None:
    allotment = {"unit": "u", "linears": ["u"], "num_weights": 2**40, "num_bits": 4, "costs": {4: 0.0}}
    budget = {"average_bits": 4}
    plan = BitPlan.model_validate(
        {"model": "m", "budget": budget, "allotments": [allotment], "bits_per_weight": 4.0, "num_bytes": 2**41}
    )
    assert plan.num_bytes == 2**41


def test_folders_to_write_are_expanded_and_written_back_as_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    exports = [{"format": "dense", "path": "${SCRATCH}/e"}]
    found = check(Recipe, BASE | {"output": {"path": "$SCRATCH/a$$b"}, "export": exports}, "r.yaml")
    assert found.output.path == Path("/scratch/a$b")
    assert found.export[0].path == Path("/scratch/e")
    assert Recipe.model_validate(resolved(found)) == found


def test_a_recipe_is_found_below_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("model: {path: m}\nmethod: {name: rtn}\noutput: {path: ~/out}\n")
    assert recipe.load("~/r.yaml").output.path == recipe.load("$HOME/r.yaml").output.path == tmp_path / "out"


def test_a_fifo_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(InputError, match=r"r\.yaml is a FIFO; a regular file is needed"):
        recipe.load(tmp_path / "r.yaml")
