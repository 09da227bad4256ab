"""``scripts/test_versions.py``: what it asks pip for, and that the tests it names are there."""

import importlib.util
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("versions_script", ROOT / "scripts" / "test_versions.py")
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.mark.parametrize(("age", "expected"), [("oldest", "typer==0.24"), ("newest", "typer<1,>=0.24")])
def test_pip_is_asked_for_the_ends_of_the_bounds(age: str, expected: str) -> None:
    assert script.asked(Requirement("typer>=0.24,<1"), age) == expected


def test_every_package_has_bounds_and_every_test_is_there() -> None:
    found = list(script.supported())
    assert [each.name for each in found] == list(script.PACKAGES)
    for each in found:
        assert {part.operator for part in each.specifier} == {">=", "<"}, each.name
    assert [name for name in script.TESTS if not (ROOT / name).is_file()] == []
