"""The names of methods, export formats and commands, found in their folders and files; nothing is imported.

``method.name: gptq`` is ``qtool/methods/gptq.py``, ``--format compressed-tensors`` is
``qtool/exporters/compressed_tensors.py``. Nothing is registered. The command line reads this before anything else, so
this module needs only the standard library.
"""

import re
from functools import cache
from pathlib import Path

ROOMS = Path(__file__).parents[1]  # the package; importlib.resources would take a hundredth of the start of --help
# the first two arguments of what a method exports: its command, and one line about it
METHOD = re.compile(r"^METHOD\b[^(]*\(\s*\"([a-z]+)\",\s*\"([^\"]+)\"", re.MULTILINE)
ALONE_METHOD, ALONE_BITS, ALONE_GROUP_SIZE = "gptq", 4, 64  # defaults for a model without a recipe


@cache
def methods() -> tuple[str, ...]:
    """Every method, by file name."""
    return _modules("methods")


@cache
def export_formats() -> tuple[str, ...]:
    """Every export format, by file name with hyphens."""
    return tuple(name.replace("_", "-") for name in _modules("exporters"))


@cache
def commands() -> dict[str, tuple[str, ...]]:
    """The methods that each command runs."""
    found: dict[str, list[str]] = {}
    for name in methods():
        found.setdefault(described(name)[0], []).append(name)
    return {command: tuple(names) for command, names in found.items()}


@cache
def described(method: str) -> tuple[str, str]:
    """The command that runs ``method``, and one line about it, read from the text of its file."""
    found = METHOD.search(_file("methods", method).read_text(encoding="utf-8"))
    assert found is not None, f"{method} exports no METHOD whose first arguments are a command and a line"
    return found[1], found[2]


def _modules(room: str) -> tuple[str, ...]:
    """The files and packages of a room whose names have no underscore in front."""
    packages = [file.parent.name for file in (ROOMS / room).glob("[a-z]*/__init__.py")]
    return tuple(sorted([*packages, *(file.stem for file in (ROOMS / room).glob("[a-z]*.py"))]))


def _file(room: str, name: str) -> Path:
    """The file of a module, or the ``__init__`` of a package."""
    file = ROOMS / room / f"{name}.py"
    return file if file.is_file() else ROOMS / room / name / "__init__.py"
