"""The names of methods, export formats and commands, found in their folders and files; nothing is imported.

``method.name: gptq`` is ``qtool/methods/gptq.py``, ``--format compressed-tensors`` is
``qtool/exporters/compressed_tensors.py``. Nothing is registered. The command line reads this before anything else, so
this module needs only the standard library.
"""

import re
from functools import cache
from pathlib import Path

ROOMS = Path(__file__).parents[1]  # the package; importlib.resources would take a hundredth of the start of --help
COMMAND = re.compile(r"^METHOD\b[^(]*\(\s*\"([a-z]+)\"", re.MULTILINE)  # first argument of what a method exports


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
    """The methods that each command runs, read from the text of their files."""
    found: dict[str, list[str]] = {}
    for name in methods():
        command = COMMAND.search(_file("methods", name).read_text(encoding="utf-8"))
        assert command is not None, f"{name} exports no METHOD whose first argument is a command"
        found.setdefault(command[1], []).append(name)
    return {command: tuple(names) for command, names in found.items()}


def _modules(room: str) -> tuple[str, ...]:
    """The files and packages of a room whose names have no underscore in front."""
    packages = [file.parent.name for file in (ROOMS / room).glob("[a-z]*/__init__.py")]
    return tuple(sorted([*packages, *(file.stem for file in (ROOMS / room).glob("[a-z]*.py"))]))


def _file(room: str, name: str) -> Path:
    """The file of a module, or the ``__init__`` of a package."""
    file = ROOMS / room / f"{name}.py"
    return file if file.is_file() else ROOMS / room / name / "__init__.py"
