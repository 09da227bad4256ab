"""Recipe files: list the packaged ones by name, and read a YAML file."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from qtool.config import validation
from qtool.system import paths, reading
from qtool.system.errors import InputError, nearest

YAML_BYTES = 2**20  # largest file that is read as YAML
TABLES = "tables/"  # prefix of the names of packaged sweeps
MODELINE = re.compile(r"^(# yaml-language-server: \$schema=)(.+)$", re.M)  # names the JSON schema, for editors


def packaged() -> dict[str, Path]:
    """Return the recipes that come with qtool by name: the path below ``recipes``, without the suffix."""
    return {name: path for name, path in _files().items() if not name.startswith(TABLES)}


def tables() -> dict[str, Path]:
    """Return the sweeps that come with qtool by name."""
    return {name: path for name, path in _files().items() if name.startswith(TABLES)}


def _files() -> dict[str, Path]:
    folder = Path(str(files("qtool") / "recipes"))
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(names.items(), key=lambda item: (item[0].count("/"), item[0])))


def text_of(path: Path) -> str:
    """Return the text of a packaged recipe or sweep, to be saved elsewhere: its schema is named by an absolute path."""
    text = path.read_text(encoding="utf-8")
    return MODELINE.sub(lambda found: f"{found[1]}{(path.parent / found[2]).resolve()}", text, count=1)


def summary(path: Path) -> str:
    """Return the first sentence of a packaged recipe or sweep: its first comment."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def runs_offline(path: Path) -> bool:
    """Return whether a packaged recipe needs no network: it has the built-in model, and text that the model writes.

    A task on text of the hub is allowed: where it is out of reach, the report says that it was not measured.
    """
    text = path.read_text(encoding="utf-8")
    if "builtin:" not in text or path.parent.name == TABLES.strip("/"):  # cells of a sweep may change model and text
        return False
    from qtool.config.sections import METRICS, DataConfig
    from qtool.config.yaml_loader import parse

    raw: Any = parse(text)
    source = raw.get("data", {}).get("source", DataConfig().source)
    return source == "generated" and {*raw.get("eval", {}).get("tasks", ())} <= METRICS.keys()


def read_yaml(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """Read the sections of a recipe (or sweep), a file or the name of a packaged one, without checking them.

    Raises:
        InputError: The file is missing, no regular file, too large, not UTF-8, not YAML, empty, or no mapping.
    """
    from qtool.config.yaml_loader import parse  # here, so that listing recipes loads no YAML library

    try:
        raw = parse(reading.read_text(find(path, what), YAML_BYTES))
    except FileNotFoundError:  # removed since it was found
        raise InputError(f"{path} does not exist") from None
    except ValueError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if raw is None:
        raise InputError(f"{path} is empty; qtool recipes quickstart prints a recipe to start from")
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds {validation.found(raw)}, not sections (model:, method:, ...)")
    return raw


def is_recipe(target: str | Path, argument: str) -> bool:
    """Return whether ``target``, the value of ``argument``, is a recipe and not a model (folder, name or GGUF file).

    Raises:
        InputError: ``target`` is no path.
    """
    suffix = Path(target).suffix
    if suffix in (".yaml", ".yml") or str(target) in packaged():
        return True
    return suffix != ".gguf" and paths.expand(target, argument).is_file()


def find(name: str | Path, what: str = "recipe") -> Path:
    """Return the file that ``name`` means: a path, in which ``~`` and variables are expanded, or a packaged name.

    Raises:
        InputError: There is no such file.
    """
    path = paths.expand(name, f"the path of the {what}")
    names, others = (packaged(), tables()) if what == "recipe" else (tables(), packaged())
    if path.exists() and not path.is_dir():
        return path
    if str(path) in names:
        return names[str(path)]
    if path.is_dir():
        raise InputError(f"{path} is a folder; a {what} is a YAML file{_model_hint(name, what)}")
    if str(path) in others:
        hint = "a packaged sweep; run it with qtool sweep" if what == "recipe" else "a packaged recipe, not a sweep"
        raise InputError(f"{path} is {hint}")
    asked = path.stem if what == "recipe" else str(path)
    hint = nearest(asked, names, f"did you mean the packaged {what} {{}}?") or "qtool recipes lists those that exist"
    is_path = path.suffix in (".yaml", ".yml") or str(name).startswith((".", "/", "~", "$"))
    of_model = "" if is_path else _model_hint(name, what, " To" if hint.endswith("?") else "; to")
    raise InputError(f"{path} does not exist; {hint}{of_model}")


def _model_hint(name: str | Path, what: str, opening: str = "; to") -> str:
    """Return what to run if ``name`` is meant as a model, in words that begin with ``opening``."""
    if what != "recipe":
        return ""
    return f"{opening} quantize a model of that name: qtool quantize {name}, or --set model.path={name} after a recipe"
