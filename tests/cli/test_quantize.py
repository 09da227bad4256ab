"""``qtool quantize`` needs no recipe and no command of a method; help and completion know each method's keys."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qtool.cli import help as help_texts
from qtool.cli import main
from qtool.cli.next_steps import next_steps
from qtool.cli.quantize import recipe_of
from qtool.cli.recipes import FOLDED, _lines
from qtool.config import catalog, describe, files, plugins
from qtool.config import recipe as recipes
from qtool.config.recipe import Recipe
from qtool.config.sections import METRICS
from qtool.system.errors import InputError


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def of_model(*set_: str, method: str | None = None, bits: int | None = None, group_size: int | None = None) -> Recipe:
    return recipe_of("org/name", method, bits, group_size, None, set_)


def test_a_model_needs_no_recipe() -> None:
    recipe = of_model()
    assert (recipe.model.path, recipe.method.name) == ("org/name", "gptq")
    assert (recipe.quant.num_bits, recipe.quant.group_size, recipe.eval) == (4, 64, None)
    assert recipe.output.path == Path("out/name-gptq-w4g64")


@pytest.mark.parametrize("method", catalog.methods())
def test_every_method_runs_from_its_name_alone(method: str) -> None:
    recipe = of_model(method=method, bits=3)
    assert type(recipe.method) is plugins.get(method).config
    assert recipe.output.path == Path(f"out/name-{method}-w3g64")


def test_options_replace_the_keys_of_a_recipe_and_set_replaces_options() -> None:
    Path("r.yaml").write_text(
        "model: {path: x}\nmethod: {name: rtn}\nquant: {num_bits: 8, group_size: 32}\noutput: {path: out/x}\n"
    )
    assert recipe_of("r.yaml", None, None, None, None, ()).quant.num_bits == 8
    recipe = recipe_of("r.yaml", "hqq", 3, 16, Path("out/y"), ["quant.group_size=128"])
    assert (recipe.method.name, recipe.quant.num_bits, recipe.quant.group_size) == ("hqq", 3, 128)
    assert recipe.output.path == Path("out/y")


@pytest.mark.parametrize(
    ("set_", "folder"),
    [
        (["quant.symmetric=false", "quant.num_bits=2"], "out/name-gptq-w2g64-asym"),
        (["quant.budget={average_bits: 3.0}"], "out/name-gptq-mixed"),
        (["output.path=out/own"], "out/own"),
        (["output={path: out/own}"], "out/own"),
    ],
)
def test_a_folder_is_named_by_what_is_made_unless_it_is_given(set_: list[str], folder: str) -> None:
    assert of_model(*set_).output.path == Path(folder)


@pytest.mark.parametrize(
    ("set_", "fault"),
    [
        (["quant.budget={average_bits: 3.0}", "quant.num_bits=4"], r"quant\.num_bits: 4 beside quant\.budget"),
        (["method.nam=rtn"], r"method\.nam: unknown key; the nearest is method\.name"),
        (["output=3"], r"output: should be a mapping"),
    ],
)
def test_faults_of_a_model_without_a_recipe_name_the_key(set_: list[str], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        of_model(*set_)


def test_help_of_quantize_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["quantize", "--help"]) == 0
    rows = capsys.readouterr().out.partition("Methods:\n")[2].splitlines()
    assert {row.split()[0] for row in rows if row.startswith("  ") and row[2] != " "} == {*catalog.methods()}
    for name in catalog.methods():
        assert catalog.described(name) == (plugins.get(name).command, plugins.get(name).summary)


@pytest.mark.parametrize("command", ["quantize", "ptq"])
def test_the_keys_of_one_method_are_shown_without_a_recipe(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([command, "--help-method", "gptq"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("gptq: second-order error compensation")
    shown = {line.split()[0] for line in text.splitlines() if line.startswith("    ") and line[4] != " "}
    sections = {key.rpartition(".")[0] + "." if "." in key else key for key in describe.method_keys("gptq")}
    assert shown == sections - {"name"}
    for name in (key.removesuffix(".") for key in shown if key.endswith(".")):
        nested = {key.partition(".")[2] for key in describe.method_keys("gptq") if key.startswith(f"{name}.")}
        assert all(key in text for key in nested)
    assert main.main([command, "--help-method", "gpt"]) == 2
    assert "--help-method: no method gpt; the nearest is gptq; known: awq, " in capsys.readouterr().err


def test_a_key_that_is_longer_than_its_column_has_a_line_of_its_own() -> None:
    lines = help_texts._wrapped("    gradient_checkpointing", "word " * 20, 60, 22).splitlines()
    assert lines[0] == "    gradient_checkpointing"
    assert all(line.startswith(" " * 22) and len(line) <= 60 for line in lines[1:])
    assert help_texts._wrapped("    key", "text", 60, 22) == f"{'    key':<22}text\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("qtool ptq quickstart --set quant.num_b", {"quant.num_bits="}),
        ("qtool ptq quickstart --set method.act", {"method.act_order="}),
        ("qtool quantize x --method hqq --set method.it", {"method.iterations="}),
        ("qtool quantize x --method effic", {"efficientqat"}),
        ("qtool eval x --tasks boolq,wiki", {"boolq,wikitext2"}),
        ("qtool recipes tables/builtin-corn", {"tables/builtin-corners"}),
    ],
)
def test_the_shell_completes_keys_methods_and_tasks(words: str, expected: set[str]) -> None:
    number = str(len(words.split()) - 1)
    env = {**os.environ, "COMP_WORDS": words, "COMP_CWORD": number, "_QTOOL_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-m", "qtool"], env=env, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


def test_recipes_are_filtered_by_a_word_and_given_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipes", "AWQ"]) == 0
    assert "awq-w4g64" in capsys.readouterr().out.split()
    assert main.main(["recipes", "w3g64", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert "gptq-w3g64" in {row["name"] for row in rows}
    for row in rows:
        assert "w3g64" in f"{row['name']} {row['description']}"
        assert files.summary(Path(row["path"])) == row["description"]
        assert row["offline"] is False
    assert main.main(["recipes", "quickstrat"]) == 2
    assert "the nearest is quickstart" in capsys.readouterr().err


def test_recipes_that_need_no_network_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipes", "--all", "--json"]) == 0
    marked = {row["name"] for row in json.loads(capsys.readouterr().out) if row["offline"]}
    assert {"quickstart", "builtin-w8a8"} <= marked
    for name in files.packaged():
        found = recipes.load(name)
        own = found.model.path.startswith("builtin:") and found.data.source == "generated"
        assert (name in marked) == (own and {*(found.eval.tasks if found.eval else ())} <= METRICS.keys()), name
    assert main.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.endswith(" [offline]")} == marked
    assert lines[-1].startswith("[offline]: needs no network")
    assert main.main(["recipes", "awq"]) == 0
    assert "offline" not in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_list_of_recipes_fits_its_terminal_and_counts_what_is_folded(width: int) -> None:
    listed = dict.fromkeys((*files.packaged(), *files.tables()), "a sentence about it, of some length " * 2)
    lines = _lines(listed, FOLDED, width)
    assert all(len(line) <= width for line in lines if line not in listed and not line.startswith(tuple(FOLDED)))
    text = "\n".join(lines)
    for name in listed:
        assert (name in text) == (not name.startswith(tuple(FOLDED)))
    for prefix in FOLDED:
        assert f"{prefix}  {sum(name.startswith(prefix) for name in listed)} " in text


def test_the_next_commands_name_the_folder_as_a_shell_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    lines = next_steps(folder, measured=False, exports=())
    assert f"qtool eval '{folder}' --tasks wikitext2,kl" in lines[0]
    assert not any("report" in line for line in lines)
    (folder / "report.html").write_text("page")
    lines = next_steps(folder, measured=True, exports=[Path("out/y")])
    assert lines[0] == f"report: {folder}/report.html"
    commands = [line.removeprefix("next:").strip() for line in lines[1:]]
    assert commands == [f"qtool bench '{folder}'", f"qtool chat '{folder}'"]
