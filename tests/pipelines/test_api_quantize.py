"""``qtool.quantize``: a model with arguments is the recipe that says the same, and the outcome loads its result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from transformers import AutoModelForCausalLM

import qtool
from qtool.config.recipe import Recipe
from qtool.pipelines import quantize
from qtool.pipelines.outcome import Outcome
from qtool.reports.report import Report

SMALL: dict[str, Any] = {"group_size": 16, "num_samples": 2, "seq_len": 16}
LIMITS: dict[str, Any] = {"eval.limit": 1, "eval.context": 16, "eval.continuations": 0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """A function that returns the recipe which ``qtool.quantize`` would run."""
    found: list[Recipe] = []
    monkeypatch.setattr(quantize, "quantize", lambda recipe, fresh: found.append(recipe))

    def asked(*arguments: Any, **keys: Any) -> Recipe:
        qtool.quantize(*arguments, **keys)
        return found[-1]

    return asked


def test_a_model_and_arguments_give_what_the_recipe_gives(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tiny.text(tmp_path)
    outcome = qtool.quantize(llama_folder, method="gptq", num_bits=3, data=text, tasks="kl", **SMALL, **LIMITS)
    raw = {
        "model": {"path": str(llama_folder)},
        "method": {"name": "gptq"},
        "quant": {"num_bits": 3, "group_size": 16},
        "data": {"source": str(text), "num_samples": 2, "seq_len": 16},
        "eval": {"tasks": ["kl"], "limit": 1, "context": 16, "continuations": 0},
        "output": {"path": "out/recipe"},
    }
    same = qtool.quantize(raw)
    assert outcome is not None
    assert same is not None
    assert outcome.path == Path("out", f"{llama_folder.name}-gptq-w3g16")
    assert [row.task for row in outcome.report.results] == ["kl"] * len(outcome.report.results)
    written = AutoModelForCausalLM.from_pretrained(outcome.path)
    assert torch.equal(tiny.logits(outcome.model), tiny.logits(written))
    assert torch.equal(tiny.logits(outcome.model), tiny.logits(same.model))
    assert outcome.tokenizer.get_vocab() == same.tokenizer.get_vocab()
    assert f"<h3>{llama_folder}, gptq w3g16" in outcome._repr_html_()


def test_a_model_alone_has_the_defaults_that_the_page_states(asked: Callable[..., Recipe]) -> None:
    recipe = asked("org/name")
    assert (recipe.model.path, recipe.method.name, recipe.eval) == ("org/name", "gptq", None)
    assert (recipe.quant.num_bits, recipe.quant.group_size) == (4, 64)
    assert recipe.output.path == Path("out/name-gptq-w4g64")
    assert asked("m", symmetric=False, group_size=-1).output.path == Path("out/m-gptq-w4pc-asym")
    assert asked("builtin:wiki-llama-3m", method={"name": "awq", "clip": False}).output.path.name.startswith("wiki-")
    assert asked("m", **{"quant.budget": {"average_bits": 3.0}}).output.path == Path("out/m-gptq-mixed")
    assert asked("m", output="o/here").output.path == Path("o/here")
    assert asked("m", output={"path": "o/here", "overwrite": True}).output.overwrite


def test_arguments_replace_the_keys_of_a_recipe_and_no_others(asked: Callable[..., Recipe]) -> None:
    packaged = qtool.load_recipe("quickstart")
    assert asked("quickstart") == packaged
    changed = asked("quickstart", num_bits=3, data={"source": "generated", "num_samples": 7}, tasks=["kl"], seed=2)
    assert (changed.quant.num_bits, changed.quant.group_size) == (3, packaged.quant.group_size)
    assert (changed.data.num_samples, changed.eval and changed.eval.tasks, changed.seed) == (7, ("kl",), 2)
    assert changed.output == packaged.output


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_bits": 4, "quant.num_bits": 3}, "quant.num_bits: given twice"),
        ({"method": 3}, "method.name: should be text; found 3"),
        ({"method": {"name": "gtpq"}}, "no such method; the nearest is gptq"),
    ],
)
def test_wrong_arguments_are_input_errors(asked: Callable[..., Recipe], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(qtool.InputError, match=message):
        asked("org/name", **keys)


def test_a_model_in_memory_is_sent_to_its_own_function(asked: Callable[..., Recipe], llama_folder: Path) -> None:
    with pytest.raises(qtool.InputError, match=r"source: found a model in memory; .* qtool\.quantize_model"):
        asked(AutoModelForCausalLM.from_pretrained(llama_folder), num_bits=3)


def test_an_outcome_without_a_folder_has_no_model() -> None:
    with pytest.raises(qtool.InputError, match="nothing was written"):
        _ = Outcome(None, Report(model="m"), [], 0.0).model
