"""The key ``target`` of a recipe."""

import pytest

from qtool.config.describe import schema
from qtool.config.recipe import Recipe, check, resolved
from qtool.config.target import TargetConfig
from qtool.system.errors import InputError

BASE = {"model": {"path": "x"}, "method": {"name": "rtn"}, "output": {"path": "y"}}


def target(value: object) -> TargetConfig | None:
    """The target of a recipe that gives ``value``."""
    return check(Recipe, {**BASE, "target": value}, "the recipe").target


def test_a_name_alone_is_the_engine() -> None:
    assert target("vllm") == target({"engine": "vllm"}) == TargetConfig(engine="vllm")
    assert target(None) is None


def test_a_version_may_be_a_number() -> None:
    found = target({"engine": "mlx", "version": 0.32})
    assert found is not None
    assert (found.version, found.said) == ("0.32", "mlx 0.32")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("vlm", r"target\.engine: no such engine; the nearest is vllm; known: vllm, sglang, .* found \"vlm\""),
        ({"engine": "llamacpp"}, r"the nearest is llama\.cpp"),
        ({"name": "vllm"}, r"target\.name: unknown key"),
        ({"engine": "vllm", "version": "new"}, r"target\.version"),
        (3, r"target: "),
    ],
)
def test_faults_are_said_with_the_nearest_name(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        target(value)


def test_a_recipe_with_a_target_is_read_back_from_plain_data() -> None:
    recipe = check(Recipe, {**BASE, "target": {"engine": "vllm", "version": "0.33"}}, "the recipe")
    assert Recipe.model_validate(resolved(recipe)) == recipe
    assert schema()["$defs"]["TargetConfig"]["type"] == ["object", "string"]
