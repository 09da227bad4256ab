"""The pages that are made from the code have all keys and recipes, and the pages by hand name the data that is read."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qtool.config import catalog, describe, files
from qtool.data.sources import C4_FILES, SOURCES
from qtool.evaluation.local_tasks import LOCAL

ROOT = Path(__file__).parents[2]
PAGES = runpy.run_path(str(ROOT / "scripts" / "docs_pages.py"))
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def described(page: str) -> dict[str, dict[str, list[str]]]:
    """Return the rows of the tables of a page by heading and key, each as its cells."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in page.splitlines():
        if line.startswith("## "):
            found[line.removeprefix("## ").replace("`", "")] = {}
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            found[list(found)[-1]][cells[0].strip("`")] = cells
    return found


def keys_in(schema: dict[str, Any], definitions: dict[str, Any], before: str = "") -> Iterator[str]:
    """Yield the dotted keys of a JSON schema, those of sections within it too; lists and words have none."""
    for name, rule in schema.get("properties", {}).items():
        options = [rule, *rule.get("anyOf", ()), *rule.get("allOf", ())]
        sections = [definitions[option["$ref"].split("/")[-1]] for option in options if "$ref" in option]
        inner = [key for section in sections for key in keys_in(section, definitions, f"{before}{name}.")]
        yield from inner or [f"{before}{name}"]


def test_the_page_of_keys_has_every_key_of_the_schema() -> None:
    schema = describe.schema()
    page = described(PAGES["keys"]())
    for name, rule in schema["properties"].items():
        if name == "method":
            continue
        alone = {"properties": {name: rule.get("items", rule)}}
        for key in keys_in(alone, schema["$defs"]):
            section, _, rest = key.partition(".")
            if rest.startswith(("embedding.", "head.")):
                section, rest = "quant.embedding, quant.head", rest.partition(".")[2]
            assert not rest or rest in page[section], key
            assert rest or name in page["Keys of the whole run"], key
    overrides = schema["$defs"]["QuantOverride"]
    assert set(keys_in(overrides, schema["$defs"])) == set(page["quant.overrides.PATTERN"])


def test_the_page_of_methods_has_every_key_of_every_method() -> None:
    schema = describe.schema()
    page = described(PAGES["methods"]())
    assert set(page) == set(catalog.methods())
    for section in schema["properties"]["method"]["oneOf"]:
        name = section["properties"]["name"]["const"]
        assert set(keys_in(section, schema["$defs"])) - {"name"} == set(page[name]), name


def test_keys_of_sections_within_sections_are_dotted() -> None:
    keys = keys_in({"properties": {"a": {"$ref": "#/$defs/A"}}}, {"A": {"properties": {"b": {}}}})
    assert list(keys) == ["a.b"]


def test_every_number_has_a_unit_or_is_said_to_have_none() -> None:
    for section, (_, rows) in describe.keys().items():
        for row in rows:
            name = section.removeprefix("method ").removesuffix(".N")
            if PAGES["is_number"](row):
                assert PAGES["unit"](row.name, name) is not None, f"{section}: {row.name} has no row in UNITS"


def test_no_unit_is_left_over() -> None:
    names = [
        f"{section.removeprefix('method ').removesuffix('.N')}.{row.name}"
        for section, (_, rows) in describe.keys().items()
        for row in rows
        if PAGES["is_number"](row)
    ]
    assert [key for key in PAGES["UNITS"] if not any(f".{name}".endswith(f".{key}") for name in names)] == []


def test_a_row_has_type_unit_default_and_description() -> None:
    keys, methods = described(PAGES["keys"]()), described(PAGES["methods"]())
    seq_len = keys["data"]["seq_len"]
    assert seq_len == ["`seq_len`", "whole number from 2, in tokens", "`512`", "Tokens per window."]
    assert keys["data"]["memory_budget"][1:3] == ["size from 0, in bytes", "`8.0GB`"]
    assert methods["lsq"]["rounding.temperature"][1:3] == ["number above 0 to 100, per code", "`4.0`"]


def test_the_page_of_recipes_has_all_of_them() -> None:
    page = PAGES["packaged"]()
    for name in files.packaged() | files.tables():
        assert page.count(f" {name}` |") == 1, name


@pytest.mark.parametrize("name", SOURCES)
def test_the_page_on_data_has_the_file_and_the_data_set_of_each_source(name: str) -> None:
    source = SOURCES[name]
    assert f"`{name}`" in DATA
    assert f"`{source.file.format(split='train')}`" in DATA
    assert source.hub.repository in DATA


def test_the_page_on_data_has_the_folders_of_tasks_and_of_c4() -> None:
    for (repository, _), folder in LOCAL.items():
        if repository != "EleutherAI/wikitext_document_level":  # the same files as the source wikitext2
            assert repository in DATA
            assert f"`{folder.format(name='SUBJECT')}/" in DATA
    assert all(f"`{file}`" in DATA or Path(file).name in DATA for file in C4_FILES)


def test_a_link_of_the_repository_becomes_one_of_the_site() -> None:
    pytest.importorskip("mkdocs")
    turned = runpy.run_path(str(ROOT / "scripts" / "docs_hooks.py"))["turned"]
    assert turned("../../CONTRIBUTING.md#tests", "inside/architecture.md") == "contributing.md#tests"
    assert turned("docs/inside/architecture.md", "inside/contributing.md") == "architecture.md"
    assert turned("tables.md", "recipes/index.md") == "tables.md"
    assert turned("https://arxiv.org/abs/2407.11062", "why.md") == "https://arxiv.org/abs/2407.11062"
    assert turned("#limits", "recipes/index.md") == "#limits"


def test_a_page_that_loads_from_the_network_ends_the_build() -> None:
    exceptions = pytest.importorskip("mkdocs.exceptions")
    hooks = runpy.run_path(str(ROOT / "scripts" / "docs_hooks.py"))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="data.md", dest_uri="data.html"))
    shim = '<script src="https://unpkg.com/iframe-worker/shim"></script><a href="https://arxiv.org">paper</a>'
    assert 'src="javascripts/iframe-worker.js"' in hooks["on_post_page"](shim, page, None)
    for loaded in ('<img src="https://a.org/b.png">', '<link rel="stylesheet" href="//fonts.org/c.css">'):
        with pytest.raises(exceptions.PluginError, match="from the network"):
            hooks["on_post_page"](loaded, page, None)
