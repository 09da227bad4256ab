"""The settings in which the runs of a comparison differ: of their locks, and of their evaluations."""

import hashlib
import json
from collections.abc import Iterator, Sequence

from pydantic import JsonValue

from qtool.reports.document import Table
from qtool.reports.measures import ComparedRun
from qtool.reports.report import Report
from qtool.system.errors import counted

SECTIONS = ("method", "quant", "data", "model", "seed", "versions", "processor", "threads", "processes")
OF_EVALUATION = ("dtype", "device", "backend")
LONGEST = 24  # characters of a value; a longer one is shown by its hash


def differing(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Return the value of each run, empty if it has none, for each setting in which runs that have it differ.

    A setting of the grid that only some of the quantized runs have counts too: in the others it is unset.
    """
    of_runs = [dict(_settings(run.report)) for run in runs]
    keys = list(dict.fromkeys(key for settings in of_runs for key in settings))
    found = {}
    for key in keys:
        values = [settings.get(key, "") for settings in of_runs]
        with_grid = [value for value, run in zip(values, runs, strict=True) if run.report.lock is not None]
        compared = set(with_grid) if key.startswith("quant.") else set(values) - {""}
        if len(compared) > 1:
            found[key] = values
    return found


def table(runs: Sequence[ComparedRun]) -> Table | None:
    """Return the table with a row for each setting in which runs differ; ``None`` if there is none."""
    rows = [[key, *values] for key, values in differing(runs).items()]
    names = [f"{index} {run.name}" for index, run in enumerate(runs, 1)]
    return Table(["setting", *names], rows, "l" + "r" * len(runs), "Settings that differ") if rows else None


def _settings(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the value of each setting; a path of the model is none, because it names a place.

    Keys of the section data are settings of runs that read calibration text only.
    """
    lock = {} if report.lock is None else report.lock.model_dump(mode="json")
    if report.calibration is None:
        lock.pop("data", None)
    quant = lock.get("quant") or {}
    if quant:
        lock["quant"] = {"grid": "affine"} | quant  # the default is in no lock
    not_used = {"model.path"} | ({"quant.num_bits"} if quant.get("budget") else set())  # a budget chooses the bits
    for section in SECTIONS:
        for key, value in _flat(section, lock.get(section)):
            if key not in not_used:
                yield key, value
    for name in OF_EVALUATION:
        if (value := getattr(report, name)) is not None:
            yield f"evaluated: {name}", value


def _flat(key: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    """Yield settings inside ``value``; the patterns of overrides are one setting."""
    if isinstance(value, dict) and not key.endswith("overrides"):
        for name, each in value.items():
            yield from _flat(f"{key}.{name}", each)
    elif value is not None and value not in ({}, []):
        yield key, _shown(value)


def _shown(value: JsonValue) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if len(text) <= LONGEST:
        return text
    mark = hashlib.sha256(text.encode()).hexdigest()[:6]
    if isinstance(value, dict):
        return f"{counted(len(value), 'pattern')}, {mark}"
    return f"{text[: LONGEST - 9]}... {mark}"
