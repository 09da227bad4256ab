"""Which arguments are recipes, and which are models."""

from pathlib import Path

import pytest

from qtool.cli.arguments import is_recipe


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("a.yaml", True),
        ("nowhere.yml", True),
        ("gptq-w4g64", True),
        ("written", True),
        ("model.gguf", False),
        ("nowhere.gguf", False),
        ("folder", False),
        ("owner/name", False),
    ],
)
def test_a_recipe_is_told_from_a_model(
    target: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("a.yaml", "written", "model.gguf"):
        (tmp_path / name).write_text("x")
    assert is_recipe(target, "TARGET") == expected
