"""The recipe of a model that is given alone, on the command line or in Python, and arguments of Python as its keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.config.catalog import ALONE_BITS, ALONE_GROUP_SIZE, ALONE_METHOD
from qtool.config.recipe import Recipe
from qtool.system.errors import InputError


def section(key: str, value: object, name: str | None = None) -> dict[str, object]:
    """Return the section ``key`` as a dict; a text is the value of its key ``name``.

    Raises:
        InputError: ``value`` is neither.
    """
    if isinstance(value, str) and name is not None:
        return {name: value}
    if isinstance(value, Mapping):
        return dict(value)
    text = f"a text ({name}) or " if name is not None else ""
    raise InputError(f"{key}: found {type(value).__name__}; give {text}a dict of its keys")


def merged(arguments: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """Return changes by dotted key: ``arguments`` by the key that each stands for, and ``changes`` as they are.

    An argument that is ``None`` is left out; a dict takes the place of the whole section of its key.

    Raises:
        InputError: a key is given twice.
    """
    given = {
        key.partition(".")[0] if isinstance(value, Mapping) else key: value
        for key, value in arguments.items()
        if value is not None
    }
    if twice := sorted(given.keys() & changes.keys()):
        raise InputError(f"{', '.join(twice)}: given twice, as an argument and by dotted key; leave one out")
    return given | dict(changes)


def start_of(model: str, changes: Mapping[str, object]) -> dict[str, Any]:
    """Return the sections of a recipe of ``model`` before ``changes``; a budget chooses the bits."""
    chosen = any(key.startswith("quant.budget") for key in changes)
    return {
        "model": {"path": model},
        "method": {"name": ALONE_METHOD},
        "quant": {"group_size": ALONE_GROUP_SIZE} | ({} if chosen else {"num_bits": ALONE_BITS}),
        "output": {"path": "out"},
    }


def with_folder(recipe: Recipe) -> Recipe:
    """Return the recipe with a folder in ``out`` that is named by model, method and grid."""
    quant, name = recipe.quant, Path(recipe.model.path.removeprefix("builtin:")).resolve().name.removesuffix(".gguf")
    grid = "mixed" if quant.budget is not None or quant.overrides else quant.label().replace(" ", "-")
    folder = Path("out") / f"{name}-{recipe.method.name}-{grid}"
    return recipe.model_copy(update={"output": recipe.output.model_copy(update={"path": folder})})
