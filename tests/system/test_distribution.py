"""Every hint to install qtool, in code and docs, names the distribution and the extras of pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qtool.cli.doctor import EXTRAS, OPTIONAL
from qtool.system.distribution import NAME, TESTED_TORCH, install

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CODE = sorted((ROOT / "qtool").rglob("*.py"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "Dockerfile", "pyproject.toml")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.py")),
    *sorted((ROOT / "scripts").rglob("*.py")),
    *sorted((ROOT / "qtool").rglob("*.md")),
    *sorted((ROOT / "qtool").rglob("*.html")),
]
WITH_EXTRAS = re.compile(r"\b(qtool[\w-]*)\[(\w+(?:, ?\w+)*)\]")  # qtool-llm[gguf,onnx]
INSTALLED = re.compile(
    r"\b(?:pip|pipx|uv|uv tool|uv pip) install\b[^\n`;&|#,]*?[\s\"'](qtool[\w-]*)(?=[\s\"'`\[.,;:)]|$)", re.M
)
CALL = re.compile(r"""(?<![\w.])install\(['"](\w+)['"]\)""")


def faults(text: str) -> list[str]:
    """Return what a text says of installing qtool that is not so in pyproject.toml."""
    extras = PROJECT["optional-dependencies"]
    wrong = [found[0] for found in WITH_EXTRAS.finditer(text) if found[1] != PROJECT["name"]]
    wrong += [
        each for found in WITH_EXTRAS.finditer(text) for each in found[2].split(",") if each.strip() not in extras
    ]
    return wrong + [found[0] for found in INSTALLED.finditer(text) if found[1] != PROJECT["name"]]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('`pip install "qtool-llm[gguf]"`', []),
        ("$ uv tool install qtool-llm", []),
        ("pip install dist/qtool_llm-0.1.0-py3-none-any.whl; qtool doctor", []),
        ("pip install torch && qtool doctor; qtool ptq quickstart", []),
        ("pip install 'qtool[gguf]'", ["qtool[gguf]", "pip install 'qtool"]),
        ("`pip install qtool`", ["pip install qtool"]),
        ("pipx install --pip-args='-q' qtool", ["pipx install --pip-args='-q' qtool"]),
        ('pip install "qtool-llm[ggml]"', ["ggml"]),
    ],
)
def test_a_wrong_hint_is_found(text: str, wrong: list[str]) -> None:
    assert faults(text) == wrong


def test_every_hint_names_the_distribution() -> None:
    wrong = {path: faults(path.read_text(encoding="utf-8")) for path in (*PAGES, *CODE)}
    assert {path: found for path, found in wrong.items() if found} == {}


def test_code_has_the_name_in_one_place() -> None:
    assert PROJECT["name"] == NAME
    assert [path.name for path in CODE if NAME in path.read_text(encoding="utf-8")] == ["distribution.py"]


def test_every_hint_of_the_code_names_an_extra_that_is_there() -> None:
    named = {extra for path in CODE for extra in CALL.findall(path.read_text(encoding="utf-8"))}
    assert named == {"cluster", "gguf", "onnx", "ort", "tasks"}
    assert named <= PROJECT["optional-dependencies"].keys()
    assert install("gguf") == f'pip install "{PROJECT["name"]}[gguf]"'
    assert install() == f"pip install {PROJECT['name']}"


def test_doctor_names_the_extra_that_has_the_package() -> None:
    for package, extra in EXTRAS.items():
        assert package in OPTIONAL
        assert package in {Requirement(each).name for each in PROJECT["optional-dependencies"][extra]}


@pytest.mark.parametrize("page", ["Makefile", "Dockerfile", "README.md", "docs/inside/releasing.md"])
def test_torch_is_installed_in_the_version_that_was_tested(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"torch(?:==|_VERSION(?: \?)?=) ?(\d[\w.]*)", text, re.I)
    assert found
    assert set(found) == {TESTED_TORCH}
