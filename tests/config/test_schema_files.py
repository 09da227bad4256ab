"""The line of a packaged recipe that names its JSON schema leads an editor to the schema of this version."""

import json
import re
from pathlib import Path

import pytest

import qtool
from qtool.config import describe, files
from qtool.config.yaml_loader import parse
from qtool.sweeps import grid

FOLDER = Path(qtool.__file__).parent / "recipes"
SCHEMAS = {"recipe.schema.json": describe.schema, "sweep.schema.json": grid.schema}
ALL = files.packaged() | files.tables()
LINE = re.compile(r"^# yaml-language-server: \$schema=(.+)$", re.M)  # what yaml-language-server looks for


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_packaged_schema_is_what_the_command_prints(name: str) -> None:
    option = " --sweep" if name.startswith("sweep") else ""
    hint = f"make it again: qtool schema{option} > qtool/recipes/{name}"
    assert json.loads((FOLDER / name).read_text(encoding="utf-8")) == json.loads(json.dumps(SCHEMAS[name]())), hint


@pytest.mark.parametrize("name", ALL)
def test_an_editor_finds_the_schema_beside_the_package_and_in_a_copy_elsewhere(name: str) -> None:
    path = ALL[name]
    expected = FOLDER / ("sweep.schema.json" if name.startswith(files.TABLES) else "recipe.schema.json")
    [beside] = LINE.findall(path.read_text(encoding="utf-8"))
    assert (path.parent / beside).resolve() == expected.resolve()
    [absolute] = LINE.findall(files.text_of(path))
    assert absolute == str(expected.resolve())


@pytest.mark.parametrize("name", ALL)
def test_the_schema_accepts_what_is_packaged(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    kind = "sweep.schema.json" if name.startswith(files.TABLES) else "recipe.schema.json"
    schema = json.loads((FOLDER / kind).read_text(encoding="utf-8"))
    written = parse(ALL[name].read_text(encoding="utf-8"))
    faults = [fault.message for fault in jsonschema.Draft202012Validator(schema).iter_errors(written)]
    assert not faults


def test_the_schema_refuses_a_key_that_does_not_exist() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    recipe = parse(files.packaged()["quickstart"].read_text(encoding="utf-8"))
    assert isinstance(recipe, dict)
    recipe["quant"]["num_bit"] = 3
    assert not jsonschema.Draft202012Validator(describe.schema()).is_valid(recipe)
