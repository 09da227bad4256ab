"""The plan of a training: small budgets get enough steps and a validation, others are what their keys say."""

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny
from helpers.methods import W4, train
from helpers.notes import Notes
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from qtool.blocks.job import Job, load_method
from qtool.config import catalog, recipe
from qtool.config.quant import QuantConfig
from qtool.config.sections import DataConfig, ModelConfig
from qtool.config.training import EndToEndConfig
from qtool.data.windows import calibration, perplexity_windows
from qtool.evaluation.perplexity import score_windows
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.pipelines import quantize
from qtool.system import progress
from qtool.system.errors import InputError
from qtool.training import linears
from qtool.training.fit import total_factor
from qtool.training.plan import plan_of

windows, batches, epochs = st.integers(2, 400), st.integers(1, 16), st.integers(1, 5)


@given(windows, batches, epochs)
def test_a_budget_of_enough_steps_is_what_its_keys_say(num: int, size: int, passes: int) -> None:
    steps = ceil(passes * num / size)
    config = EndToEndConfig(batch_size=size, epochs=passes)
    assume(steps >= config.min_steps)
    plan = plan_of(config, num)
    assert plan[:3] == (steps, num, 0)
    assert plan.total == total_factor(steps, config.optim)
    assert not plan.notes


@given(windows, batches, epochs)
def test_a_small_budget_gets_the_steps_and_rates_of_the_minimum_and_a_validation(
    num: int, size: int, passes: int
) -> None:
    config = EndToEndConfig(batch_size=size, epochs=passes)
    asked = ceil(passes * num / size)
    assume(asked < config.min_steps)
    plan = plan_of(config, num)
    assert plan.num_steps == config.min_steps
    assert plan.total == total_factor(config.min_steps, config.optim)
    assert plan.num_trained + plan.num_held_out == num
    assert 1 <= plan.num_held_out <= max(1, num / 8)
    assert plan.validate_every == config.min_steps // 8
    (note,) = plan.notes
    assert note.startswith(f"{num} windows make {asked} training steps, fewer than min_steps (32): they are used again")
    assert note.endswith(f"the best state is chosen on {plan.num_held_out} of {num} windows")


@pytest.mark.parametrize("steps", [1, 2, 31])
def test_steps_that_are_given_are_kept_but_are_no_longer_than_those_of_the_minimum(steps: int) -> None:
    config = EndToEndConfig(steps=steps)
    plan = plan_of(config, 128)
    assert plan.num_steps == steps
    assert plan.num_held_out == 8
    assert plan.total == total_factor(32, config.optim)
    assert f"{steps} steps are fewer than min_steps (32): learning rates are those of 32 steps" in plan.notes[0]


def test_without_a_minimum_or_without_steps_nothing_is_added() -> None:
    assert plan_of(EndToEndConfig(min_steps=0), 8)[:3] == (2, 8, 0)
    assert plan_of(EndToEndConfig(steps=0), 1)[:3] == (0, 1, 0)


def test_validation_that_is_given_is_kept() -> None:
    assert plan_of(EndToEndConfig(validation_samples=3), 8)[:3] == (32, 5, 3)
    none = plan_of(EndToEndConfig(validation_samples=0), 1)
    assert none[:3] == (32, 1, 0)
    assert none.notes[0].endswith("nothing is validated")
    given = plan_of(EndToEndConfig(validation_samples=8), 256)
    assert given[:4] == (62, 248, 8, 8)
    assert plan_of(EndToEndConfig(validation_samples=8, validate_every=0), 256).validate_every == 0


# -------------------------------------------------------------------------------------------------- too little text


def written(folder: Path, method: dict[str, Any], num_samples: int) -> Path:
    tiny.llama(folder / "float")
    tiny.text(folder)
    raw = {
        "model": {"path": str(folder / "float"), "device": "cpu"},
        "method": method,
        "quant": {"num_bits": 4, "group_size": 16},
        "data": {"source": str(folder / "prose.txt"), "num_samples": num_samples, "seq_len": 32},
        "output": {"path": str(folder / "out")},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


@pytest.mark.parametrize(("name", "where"), [("lsq", "method"), ("lrqat", "method"), ("efficientqat", "method.e2e")])
def test_one_window_is_refused_before_anything_is_begun(tmp_path: Path, name: str, where: str) -> None:
    message = rf"1 calibration window is too little .* 2 are needed .* Raise data\.num_samples, or set {where}\.valid"
    with pytest.raises(InputError, match=message):
        quantize.quantize(recipe.load(written(tmp_path, {"name": name}, 1)))
    assert not list(tmp_path.glob("out*"))


# ------------------------------------------------------------------------------------------ what comes of a few windows


def test_a_few_windows_are_announced_and_end_in_the_best_state(
    make_llama: Callable[[], LoadedModel], tokens: Tensor
) -> None:
    """Far too long steps only do harm, so the start is kept, and the user is told."""
    notes = Notes()
    options: dict[str, Any] = {"min_steps": 4, "travel": 40.0}
    with progress.use(notes):
        found, series = train(load_method("lsq"), make_llama(), tokens, W4, **options)
    still, _ = train(load_method("lsq"), make_llama(), tokens, W4, steps=0)
    assert len(series["loss"]) == 4
    assert len(series["validation"]) == 5
    assert all(torch.equal(found[name].codes, weight.codes) for name, weight in still.items())
    first, last = notes.texts
    assert first.startswith("5 windows make 3 training steps, fewer than min_steps (4)")
    assert last.startswith("no state had a lower validation loss than the start")


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["lsq", "qat"])
def test_a_step_of_a_short_training_moves_no_weight_far(
    name: str, make_llama: Callable[[], LoadedModel], tokens: Tensor, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight may move by ``travel`` steps of its grid in ``min_steps`` steps, so by that share in fewer."""
    moved: list[float] = []
    make = load_method(name)
    layers: list[Any] = []

    def watched(model: Any, made: dict[str, Any]) -> None:
        layers.extend(made.items())
        pack(model, made)

    pack = linears.pack_linears
    monkeypatch.setattr(linears, "pack_linears", watched)
    loaded = make_llama()
    before = {target.name: target.weight.clone() for target in Job.select(loaded, W4).targets}
    config = make.config(steps=steps, validation_samples=0)
    make.run(Job.select(loaded, W4, tokens), config)
    for name, layer in layers:
        distance = (layer.weight.detach() - before[name].float()).abs().max() / layer.qparams()[0].detach().abs().mean()
        moved.append(float(distance))
    assert 0 < max(moved) < 1.3 * config.travel * steps / total_factor(config.min_steps, config.optim)


TRAINED = [name for name in catalog.methods() if load_method(name).command in ("qat", "lrqat", "efficientqat")]


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["w4", "w2 asym"])
@pytest.mark.parametrize("num_samples", [2, 8])
@pytest.mark.parametrize("name", TRAINED)
def test_a_few_windows_leave_a_model_no_worse_than_rounding_to_nearest(
    name: str, num_samples: int, grid: str, data_dir: Path
) -> None:
    quant = QuantConfig(num_bits=int(grid[1]), group_size=64, symmetric=grid == "w4")
    text = DataConfig(source="enwiki", num_samples=num_samples, seq_len=128)

    def perplexity(method: str) -> float:
        loaded = load_model(ModelConfig(path="builtin:wiki-llama-3m", dtype="float32", device="cpu"))
        tokens = calibration(text, loaded, 0).tokens
        chosen = load_method(method)
        chosen.run(Job.select(loaded, quant, tokens), chosen.config())
        scores = score_windows(loaded.model, None, perplexity_windows("wikitext2", loaded, 512, 8, 0), 1, False, "")
        return float(scores.nll.mean().exp())

    assert perplexity(name) <= perplexity("rtn")


@pytest.mark.parametrize("keys", [{"steps": 2**31 - 1}, {"min_steps": 2**31 - 1}, {"epochs": 10**6}])
def test_a_training_of_endless_steps_is_refused_at_once(keys: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"^method: the training has [\d,]+ steps; at most 1,000,000 are taken"):
        plan_of(EndToEndConfig.model_validate({"batch_size": 1, **keys}), 100)
