"""The grid of a sweep: from a base recipe and the keys that vary to cells, each a complete recipe.

A cell is the base recipe with changes in this order: ``set``, then the axes of ``grid`` in the order of the file, or
the changes of an entry of ``cells``, and last ``--set``. A change is a dotted key of the recipe and a value. A mapping
is merged into its section; but a ``method`` section with a name replaces the previous section, whose keys belong to
another method. The key ``recipe`` replaces the base recipe. An entry's ``start`` sets ``method.init_from`` to the
folder of another cell.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from qtool.config import plugins, validation
from qtool.config.describe import DIALECT, Key, keys_of
from qtool.config.files import find, read_yaml, tables
from qtool.config.overrides import assignment, changed
from qtool.config.recipe import Recipe, examine
from qtool.config.sweep import SweepConfig
from qtool.system import paths, reading
from qtool.system.errors import InputError, counted, listing, nearest

Change = tuple[str, Any]
NAME = re.compile(r"[A-Za-z0-9][\w.,=+-]*")
RESERVED = ("sweep", "submitit")  # names of other files and folders in a sweep's folder
SUFFIXES = (".partial", ".yaml", ".log")
BASE = "recipe"
OF_CELL = ("columns", "start")  # keys of an entry of cells that change no key of the recipe
MAX_CELLS = 1000  # most cells of a sweep without --max-cells; the largest table of a paper has 82


class CellSpec(NamedTuple):
    """One cell as written: its name, its label on each axis, its base recipe, and the changes to it."""

    name: str
    columns: dict[str, str]
    base: str | dict[str, Any]
    changes: tuple[Change, ...]
    start: str | None = None  # name of the cell from whose checkpoint the training starts


class CellRecipe(NamedTuple):
    """One cell as it will run; ``raw`` is its recipe without defaults."""

    name: str
    columns: dict[str, str]
    raw: dict[str, Any]
    recipe: Recipe
    start: str | None = None  # name of the cell from whose checkpoint the training starts

    @property
    def command(self) -> str:
        """The qtool command that runs the cell's method."""
        return plugins.get(self.recipe.method.name).command


class Sweep(NamedTuple):
    """A checked sweep."""

    name: str
    title: str
    config: SweepConfig
    output: Path
    cells: tuple[CellRecipe, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns, in table order."""
        return tuple(dict.fromkeys(column for cell in self.cells for column in cell.columns))


def keys() -> list[Key]:
    """Return the keys of a sweep, for ``--help``."""
    return keys_of(SweepConfig)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a sweep; the recipes inside it have a schema of their own."""
    return {"$schema": DIALECT, **SweepConfig.model_json_schema(), "title": "qtool sweep"}


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    *,
    max_cells: int = MAX_CELLS,
    allow_launcher_commands: bool = False,
) -> Sweep:
    """Load and check the sweep at ``path``, a file or the name of a packaged sweep.

    ``overrides`` are ``key=value``: a key of the sweep, or a recipe key that changes every cell. ``output`` replaces
    the sweep's own output folder. ``allow_launcher_commands`` lets the launcher have any parameters, also those that
    run commands.

    Raises:
        InputError: Every fault of the sweep, or else every fault of all its cells.
    """
    raw, wrong, given = read_yaml(path, "sweep"), [], []
    if "recipe" not in raw and {"model", "method"} & raw.keys():
        raise InputError(
            f"{path} is a recipe, which qtool quantize {path} runs; a sweep has the sections recipe: (a recipe, or the "
            "name of one) and grid: (keys and their values)"
        )
    for text in overrides:
        try:
            key, value = assignment(text)
            if key.partition(".")[0] in SweepConfig.model_fields:
                raw = changed(raw, key, value)
            else:
                given.append((key, value))
        except ValueError as error:
            wrong.append(f"--set {text}: {error}")
    config, found = examine(SweepConfig, raw)
    wrong += found
    cells: list[CellSpec] = []
    if config is not None:
        wrong += [] if allow_launcher_commands else config.launcher.commands()
        cells, found = expand(config, max_cells)
        varied = {key for where, changes in _all_changes(config) if where != "set" for key, _ in changes}
        wrong += found + [
            f"--set {key}: this key varies from cell to cell"
            for key, _ in given
            if any(f"{other}.".startswith(f"{key}.") for other in varied)
        ]
    if wrong or config is None:
        raise InputError(listing(f"{path} has {counted(len(wrong), 'fault')}:", wrong))
    file = find(path, "sweep")
    name = str(path) if file == tables().get(str(path)) else file.stem
    folder = output or config.output or Path("out", "sweeps", *Path(name).parts)
    return Sweep(name, _title(file), config, folder, check(cells, given, folder, path))


def expand(config: SweepConfig, max_cells: int = MAX_CELLS) -> tuple[list[CellSpec], list[str]]:
    """Return the cells of a sweep, unchecked, and the faults of its axes and names; at most ``max_cells`` are made."""
    count = len(config.cells) + (math.prod(map(len, config.grid.values())) if config.grid else 0)
    if max(count, len(config.exclude)) > max_cells:
        what = f"{count:,} cells" if count > max_cells else f"{len(config.exclude):,} entries in exclude"
        return [], [f"the sweep has {what}; at most {max_cells:,} are taken, or pass --max-cells with a larger number"]
    wrong = list(_axis_faults(config))
    if wrong:
        return [], wrong
    axes = {axis: dict(_choices(axis, values)) for axis, values in config.grid.items()}
    common = tuple(config.set.items())
    cells, used = [], [0] * len(config.exclude)
    for labels in product(*axes.values()) if axes else ():
        columns = dict(zip(axes, labels, strict=True))
        hits = [_fits(entry, columns) for entry in config.exclude]
        used = [count + hit for count, hit in zip(used, hits, strict=True)]
        if not any(hits):
            changes = [change for axis, label in columns.items() for change in _changes(axis, axes[axis][label])]
            name = "-".join(_slug(axis, label, config.grid[axis]) for axis, label in columns.items())
            cells.append(_cell(config, name, columns, (*common, *changes)))
    for name, entry in config.cells.items():
        columns = {key: _text(value) for key, value in (entry.get("columns") or {}).items()} or {"cell": name}
        changes = [(key, value) for key, value in entry.items() if key not in OF_CELL]
        cells.append(_cell(config, name, columns, (*common, *changes))._replace(start=entry.get("start")))
    wrong += _start_faults(config, cells)
    for entry, count in zip(config.exclude, used, strict=True):
        if not count:
            wrong.append(f"exclude: no cell has {validation.found(entry)}")
    if not cells:
        wrong.append("the sweep has no cells; give grid or cells")
    for name, count in Counter(cell.name for cell in cells).items():
        if count > 1:
            wrong.append(f"{count} cells would have the name {name}; give the values labels: {{label: value}}")
        if not NAME.fullmatch(name) or name in RESERVED or name.endswith(SUFFIXES):
            wrong.append(f"{name!r} cannot be the name of a cell's folder; choose another name or label")
    known = dict.fromkeys(column for cell in cells for column in cell.columns)
    wrong += [
        f"over: no column is called {axis!r}; there are {', '.join(known)}" for axis in config.over if axis not in known
    ]
    return cells, wrong


def check(
    cells: Sequence[CellSpec], given: Sequence[Change], folder: Path, source: str | Path
) -> tuple[CellRecipe, ...]:
    """Return every cell as a checked recipe that writes below ``folder``; ``given`` changes all cells, last.

    Raises:
        InputError: Every fault of all cells, each once, with the cells that have it.
    """
    planned, wrong = [], dict[str, list[str]]()
    read = cache(read_yaml)
    for cell in cells:
        try:
            start = [] if cell.start is None else [("method.init_from", paths.path_text(folder / cell.start))]
            raw = _raw(_base(cell.base, read), (*cell.changes, *given, *start)) | {
                "output": {"path": paths.path_text(folder / cell.name)}
            }
            checked, found = examine(Recipe, raw)
        except (InputError, ValueError) as error:
            checked, found = None, [str(error)]
        if checked is not None and checked.export:
            found = ["export: a sweep writes no exports; remove this section, and run qtool export on a cell's folder"]
        if checked is not None and checked.gate.asked:
            found = [*found, "gate: a sweep shows every cell, whatever its loss; remove this section"]
        for fault in found:
            wrong.setdefault(fault, []).append(cell.name)
        if checked is not None:
            planned.append(CellRecipe(cell.name, cell.columns, raw, checked, cell.start))
    if wrong:
        bad = len({name for names in wrong.values() for name in names})
        head = f"{source}: {bad} of {len(cells)} cell(s) have faults:"
        raise InputError(listing(head, fault_lines(wrong, len(cells))))
    return tuple(planned)


def fault_lines(wrong: Mapping[str, Sequence[str]], total: int) -> list[str]:
    """Return a line for each fault; it begins with the cells, of ``total``, that have the fault."""
    return [f"[{which(names, total)}] {fault}".replace("\n", "\n  ") for fault, names in wrong.items()]


def which(names: Sequence[str], total: int) -> str:
    """Return a short list of some of ``total`` cells."""
    if len(names) == total > 1:
        return "all cells"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _base(value: object, read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return the sections of a base recipe, which are written in the sweep, or which ``read`` reads."""
    if isinstance(value, str):
        return read(value)
    if not isinstance(value, dict):
        raise ValueError(f"recipe: should be a name, a path or sections; found {validation.found(value)}")
    return value


def _raw(raw: dict[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    for key, value in changes:
        replaces = key == "method" and isinstance(value, Mapping) and "name" in value
        raw = changed(raw, key, value if replaces else _merged(_at(raw, key), value))
    return raw


def _merged(before: object, value: object) -> object:
    if not isinstance(before, Mapping) or not isinstance(value, Mapping):
        return value
    return {**before, **{key: _merged(before.get(key), each) for key, each in value.items()}}


def _at(raw: object, key: str) -> object:
    """Return the value at a dotted key; ``None`` if there is none."""
    for part in key.split("."):
        raw = raw.get(part) if isinstance(raw, Mapping) else None
    return raw


def _cell(config: SweepConfig, name: str, columns: dict[str, str], changes: tuple[Change, ...]) -> CellSpec:
    bases = [value for key, value in changes if key == BASE]
    return CellSpec(name, columns, bases[-1] if bases else config.recipe, tuple(c for c in changes if c[0] != BASE))


# axes


def _axis_faults(config: SweepConfig) -> Iterator[str]:
    """Yield the faults of axes and keys that are found without making cells."""
    for axis, values in config.grid.items():
        if not values:
            yield f"grid.{axis}: no values"
        for label, count in Counter(label for label, _ in _choices(axis, values)).items():
            if count > 1:
                yield f"grid.{axis}: {count} values are called {label}; give them labels: {{label: value, ...}}"
        if isinstance(values, list):
            if not _is_key(axis):
                hint = nearest(axis.partition(".")[0], (*Recipe.model_fields, BASE), "; the nearest section is {}")
                yield f"grid.{axis}: not a key of a recipe, so it needs {{label: {{key: value}}}}{hint}"
            for value in values:
                if isinstance(value, dict | list):
                    written = f"write the axis as a mapping, {axis}: {{label: value, ...}}"
                    yield f"grid.{axis}: {validation.found(value)} needs a label: {written}"
        elif not _is_key(axis):
            for label, value in values.items():
                if not isinstance(value, dict):
                    found = validation.found(value)
                    yield f"grid.{axis}.{label}: should be a mapping of changes (dotted key -> value); found {found}"
    for entry in config.exclude:
        for axis in entry:
            if axis not in config.grid:
                yield f"exclude: no axis is called {axis!r}; there are {', '.join(config.grid) or 'none'}"
    for where, changes in _all_changes(config):
        for key, _ in changes:
            if key.partition(".")[0] == "output":
                yield f"{where}: {key}: each cell writes into a folder of its own; remove this key"
            elif not _is_key(key):
                hint = nearest(key.partition(".")[0], (*Recipe.model_fields, BASE), "; the nearest is {}")
                yield f"{where}: {key}: not a section of a recipe{hint}"
    for name, entry in config.cells.items():
        if not isinstance(entry.get("columns", {}), dict):
            yield f"cells.{name}.columns: should be a mapping; found {validation.found(entry['columns'])}"


def _start_faults(config: SweepConfig, cells: Sequence[CellSpec]) -> Iterator[str]:
    """Yield the faults of ``start`` in entries of ``cells``."""
    first = [cell.name for cell in cells if cell.start is None]
    for cell in cells:
        if cell.start is None:
            continue
        if cell.start not in first:
            known = ", ".join(first) or "none"
            yield f"cells.{cell.name}.start: no cell without a start is called {cell.start!r}; there are {known}"
        elif config.keep == "reports":
            yield f"cells.{cell.name}.start: keep: reports deletes the weights of {cell.start}; use keep: all"


def _all_changes(config: SweepConfig) -> Iterator[tuple[str, Sequence[Change]]]:
    """Yield all changes of a sweep after the place where they are written; the value of an axis is left out."""
    yield "set", tuple(config.set.items())
    for name, entry in config.cells.items():
        yield f"cells.{name}", [change for change in entry.items() if change[0] not in OF_CELL]
    for axis, values in config.grid.items():
        if _is_key(axis):
            yield "grid", [(axis, None)]
        elif isinstance(values, dict):
            for label, value in values.items():
                yield f"grid.{axis}.{label}", tuple(value.items()) if isinstance(value, dict) else ()


def _is_key(name: str) -> bool:
    return name == BASE or name.partition(".")[0] in Recipe.model_fields


def _choices(axis: str, values: Sequence[Any] | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield label and value of each choice on an axis."""
    if isinstance(values, Mapping):
        yield from ((_text(label), value) for label, value in values.items())
    elif axis == BASE:
        yield from ((Path(str(value)).stem, value) for value in values)
    else:
        yield from ((_text(value), value) for value in values)


def _changes(axis: str, value: Any) -> Sequence[Change]:
    return [(axis, value)] if _is_key(axis) else list(value.items())


def _fits(entry: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Return whether an entry of ``exclude`` matches the cell with these columns."""
    wanted = {axis: value if isinstance(value, list) else [value] for axis, value in entry.items()}
    return all(columns[axis] in map(_text, values) for axis, values in wanted.items())


def _text(value: object) -> str:
    """Return a value as written in a recipe."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _slug(axis: str, label: str, values: Sequence[Any] | Mapping[str, Any]) -> str:
    """Return the part of a cell's name for one axis: a label or word as it is, other values as ``num_bits=3``."""
    words = isinstance(values, Mapping) or axis == BASE or any(v == label for v in values if isinstance(v, str))
    text = re.sub(r"[^\w.,=+-]+", "_", label).strip("_")
    return text if words else f"{axis.rpartition('.')[2]}={text}"


def _title(file: Path) -> str:
    """Return the comment in the first line of the file, which is the sweep's title."""
    first = reading.read_text(file).partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""
