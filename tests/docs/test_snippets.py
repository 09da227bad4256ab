"""The code blocks of README and docs say whether they are run, run if they say so, and name what exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers import snippets
from helpers.snippets import Snippet
from typer.core import TyperGroup

from qtool.cli import app
from qtool.config import files, recipe
from qtool.config.recipe import Recipe
from qtool.config.sweep import SweepConfig
from qtool.config.yaml_loader import parse

ALL = snippets.snippets()
CODE = [each for each in ALL if each.language in snippets.CODE and each.page != snippets.OWN]
RUN, SLOW = ("run",), ("run", "run: slow")  # marks of the blocks that a fast and a slow test run
BASE: dict[str, Any] = {"model": {"path": "builtin:wiki-llama-3m"}, "method": {"name": "gptq"}, "output": {"path": "o"}}


def of_page(marks: tuple[str, ...]) -> list[Any]:
    """Return the blocks with one of ``marks``, those of a page together, as parameters of a test."""
    blocks: dict[str, list[Snippet]] = {}
    for each in CODE:
        if each.mark in marks:
            blocks.setdefault(each.page, []).append(each)
    return [pytest.param(found, id=page) for page, found in blocks.items() if any(e.mark == marks[-1] for e in found)]


@pytest.mark.parametrize("snippet", CODE, ids=str)
def test_a_block_says_whether_it_is_run_and_why_not(snippet: Snippet) -> None:
    reason = re.fullmatch(r"not run: (.{10,})", snippet.mark)
    expected = "<!-- run -->, <!-- run: slow --> or <!-- not run: REASON -->"
    assert snippet.mark in SLOW or reason, f"{snippet}: {expected} was expected on the line before the block"


@pytest.mark.parametrize("found", of_page(RUN))
def test_what_is_marked_runs(found: list[Snippet], tmp_path: Path) -> None:
    for each in found:
        snippets.run(each, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("found", of_page(SLOW))
def test_what_is_marked_slow_runs(found: list[Snippet], tmp_path: Path) -> None:
    for each in found:
        snippets.run(each, tmp_path)


def test_a_block_that_fails_is_seen(tmp_path: Path) -> None:
    [broken] = snippets.snippets_of("<!-- run -->\n```console\n$ qtool recipes nope | cat\n```\n", "page.md")
    with pytest.raises(AssertionError, match="no packaged recipe has nope"):
        snippets.run(broken, tmp_path)


@pytest.mark.parametrize("snippet", [each for each in ALL if each.language == "console"], ids=str)
def test_commands_and_options_exist(snippet: Snippet) -> None:
    """No command is run: its name and options are looked up, and a packaged recipe is read with its changes."""
    group = typer.main.get_command(app.app)
    assert isinstance(group, TyperGroup)
    context = typer.Context(group, info_name="qtool")
    for command in snippets.commands(snippet.code):
        for words in snippets.calls(command):
            name, *rest = words
            found = group.get_command(context, name)
            assert found is not None, f"{snippet}: qtool {name}"
            values, _, _ = found.make_parser(typer.Context(found, info_name=name, parent=context)).parse_args(rest)
            if values.get("recipe") in files.packaged():
                recipe.load(values["recipe"], values.get("set_") or ())


@pytest.mark.parametrize("snippet", [each for each in ALL if each.language == "yaml"], ids=str)
def test_recipes_in_the_text_are_valid(snippet: Snippet) -> None:
    written = parse(snippet.code)
    assert isinstance(written, dict)
    if "grid" in written or "recipe" in written:
        config = recipe.check(SweepConfig, written, str(snippet))
        assert config.recipe is not None
        return
    missing = [key for key in written if key not in Recipe.model_fields]
    assert not missing, f"{snippet}: {missing}"
    recipe.check(Recipe, recipe.with_plan(BASE | written), str(snippet))
