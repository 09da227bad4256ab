"""One contract for every decoder family: right in every step, or refused with the line of ``refused.yaml``."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from helpers.architecture_checks import EXPORTS, GENERATED, STATES, STEPS, check
from helpers.architectures import architectures, read_table

FAST = (  # of each kind: attention and rotary variants, transposed linears, states of two shapes, experts, towers
    "llama",
    "gpt2",
    "gemma3n_text",
    "gemma4_e",
    "qwen3_5_text",
    "falcon_h1",
    "xlstm",
    "nemotron_h_dense",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "qwen2_vl",
    "gemma3_vl_big_vision",
)
FAST_STEPS = (STATES, GENERATED, "rtn", "gptq")
PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "architectures.md"
NUM_RIGHT = 120  # fewest models that must be right in every step


def unexpected(name: str, outcomes: dict[str, str]) -> dict[str, str]:
    """Return the steps whose outcome is not the expected one, with it."""
    table = read_table("refused")
    lines = {step: line for steps, line in table["models"].get(name, {}).items() for step in steps.split()}
    found = {}
    for step, outcome in outcomes.items():
        if step in EXPORTS:
            reasons = [f"refused: {pattern}" for pattern in table["exports"]]
            if outcome != "ok" and not any(fnmatchcase(outcome, reason) for reason in reasons):
                found[step] = outcome
        elif outcome != (f"refused: {lines[step]}" if step in lines else "ok"):
            found[step] = outcome
    return found


@pytest.mark.parametrize("name", FAST)
def test_a_family_of_each_kind_is_right_by_rounding_and_by_gptq(name: str, tmp_path: Path) -> None:
    assert unexpected(name, check(name, tmp_path, FAST_STEPS)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures())
def test_a_family_is_right_in_every_step_or_refused_with_its_line(name: str, tmp_path: Path) -> None:
    assert unexpected(name, check(name, tmp_path, STEPS)) == {}


def test_what_may_be_refused_is_a_family_and_a_step() -> None:
    models = read_table("refused")["models"]
    assert set(models) <= set(architectures())
    assert {step for steps in models.values() for each in steps for step in each.split()} <= set(STEPS)
    assert len(architectures()) - len(models) >= NUM_RIGHT


def test_the_page_has_every_family_and_none_that_is_wrong_or_crashes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| ([\w.-]+) \| (?:ok|ref)", page, re.MULTILINE) == list(architectures())
    counts = re.search(
        r"\*\*(\d+) right in every step, (\d+) refused in a step, 0 silently wrong, 0 crashed\.\*\*", page
    )
    assert counts is not None
    assert int(counts[1]) == len(architectures()) - len(read_table("refused")["models"])
    assert int(counts[1]) >= NUM_RIGHT
