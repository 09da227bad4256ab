"""Presets set the length of a training; a recipe's own keys replace theirs, and the default preset changes nothing."""

from collections.abc import Mapping
from typing import Any

import pytest

from qtool.blocks.job import load_method
from qtool.config import catalog, plugins, recipe
from qtool.config.describe import keys_of
from qtool.config.sections import DataConfig
from qtool.config.training import EndToEndConfig, PresetConfig
from qtool.system.errors import InputError
from qtool.training.plan import plan_of

OF: dict[str, Any] = {name: plugins.get(name).config for name in catalog.methods()}
METHODS = [name for name, config in OF.items() if issubclass(config, PresetConfig)]
COUNT = DataConfig().num_samples


def made(method: str, **keys: Any) -> Any:
    return OF[method].model_validate(keys)


def flat(keys: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The values of nested keys by dotted name."""
    found: dict[str, float] = {}
    for name, value in keys.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {before + name: value}
    return found


def nested(name: str, value: float) -> dict[str, Any]:
    first, _, rest = name.partition(".")
    return {first: nested(rest, value) if rest else value}


def value_of(config: Any, name: str) -> float:
    for part in name.split("."):
        config = getattr(config, part)
    return float(config)


def num_steps(config: Any) -> list[float]:
    """The steps of each phase of a training on the default number of windows, unless the preset sets another."""
    count = config.data_defaults.get("num_samples", COUNT)
    if isinstance(config, EndToEndConfig):
        return [plan_of(config, count).num_steps]
    if isinstance(getattr(config, "e2e", None), EndToEndConfig):
        blocks = max(config.min_steps, config.epochs * count / config.batch_size)
        return [blocks, plan_of(config.e2e, count).num_steps]
    if hasattr(config, "epochs"):
        return [max(config.min_steps, config.epochs * count / config.batch_size)]
    return [config.iterations]


def test_every_method_that_trains_has_presets() -> None:
    """A method trains where it reads text, and has a key for its number of steps, epochs or iterations."""
    for name, config in OF.items():
        has_length = bool({"epochs", "steps", "iterations"} & {key.name.split(".")[-1] for key in keys_of(config)})
        assert (name in METHODS) == (has_length and load_method(name).needs_data(config())), name


@pytest.mark.parametrize("method", METHODS)
def test_the_preset_is_the_first_key_and_says_what_it_sets(method: str) -> None:
    key = keys_of(OF[method])[1]
    assert key.name == "preset"
    for keys in OF[method].presets.values():
        for name, value in flat(keys).items():
            assert f"{name} {value:g}" in key.description


@pytest.mark.parametrize("method", METHODS)
def test_light_makes_a_quarter_of_the_steps_and_best_four_times_as_many(method: str) -> None:
    default = num_steps(made(method))
    for light, steps, best in zip(
        num_steps(made(method, preset="light")), default, num_steps(made(method, preset="best")), strict=True
    ):
        assert light == pytest.approx(steps / 4)
        assert 4 * steps <= best <= 5 * steps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["light", "best"])
def test_every_key_of_a_preset_takes_effect_and_yields_to_the_recipes(method: str, preset: str) -> None:
    keys = flat({name: each for name, each in OF[method].presets[preset].items() if name != "data"})
    config = made(method, preset=preset)
    for name, value in keys.items():
        assert value_of(config, name) == value != value_of(made(method), name)
        given = made(method, preset=preset, **nested(name, 7))
        assert value_of(given, name) == 7
        assert all(value_of(given, other) == kept for other, kept in keys.items() if other != name)


@pytest.mark.parametrize("method", METHODS)
def test_the_default_preset_changes_nothing(method: str) -> None:
    assert made(method) == made(method, preset="default")
    assert not made(method).data_defaults


def test_a_second_phase_can_be_left_out_of_any_preset() -> None:
    config = made("efficientqat", preset="best", e2e={"steps": 0})
    assert not load_method("efficientqat").end_to_end(config)
    assert config.e2e.scale_share == made("efficientqat").e2e.scale_share


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["bestt", ["best"], None, 3])
def test_an_unknown_preset_is_a_fault(method: str, preset: object) -> None:
    with pytest.raises(InputError, match=r"method\.preset"):
        recipe.check(recipe.Recipe, {"method": {"name": method, "preset": preset}}, "r")


@pytest.mark.parametrize("method", METHODS)
def test_a_resolved_recipe_says_the_same_again(method: str) -> None:
    raw = {"model": {"path": "m"}, "method": {"name": method, "preset": "best"}, "output": {"path": "out"}}
    config = recipe.Recipe.model_validate(raw)
    assert recipe.Recipe.model_validate(recipe.resolved(config)) == config
