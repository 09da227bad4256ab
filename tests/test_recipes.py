"""Every packaged recipe loads, says what it does and how to run it, and writes where no other one does."""

import re
from pathlib import Path

import pytest

from qtool import methods, recipe

PATHS = sorted((Path(recipe.__file__).parent / "recipes").rglob("*.yaml"))


def test_none_is_forgotten() -> None:
    assert len(PATHS) == 9
    assert list(recipe.packaged().values()) == PATHS


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_loads_and_opens_with_what_it_does_and_its_command(path: Path) -> None:
    checked = recipe.load(path)
    assert checked == recipe.load(path.stem)
    what, command = path.read_text(encoding="utf-8").splitlines()[:2]
    assert re.fullmatch(r"# [A-Z].{20,100}\.", what)
    assert command == f"#   qtool {methods.get(checked.method.name).command} {path.stem}"


def test_each_has_an_output_of_its_own() -> None:
    outputs = [recipe.load(path).output.path for path in PATHS]
    assert len(set(outputs)) == len(outputs)
    assert all(path.parts[0] == "out" for path in outputs)


def test_the_folder_at_the_top_is_the_packaged_one() -> None:
    top = Path(__file__).parents[1] / "recipes"
    assert sorted(top.resolve().rglob("*.yaml")) == [path.resolve() for path in PATHS]
