"""The runs that ``qtool compare`` is given: reports in folders or files, and what of them is left out.

What may lie beside runs, such as a comparison, an export or a log, is left out with its reason, so that ``out/*`` can
be given. What is named ``report.json`` and cannot be read is an error, and so is a path that does not exist.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from qtool.reports.comparison import COMPARE_NAME, Comparison, comparison
from qtool.reports.report import JSON_NAME, Report
from qtool.system import reading
from qtool.system.errors import InputError, listing
from qtool.system.printable import printable

KINDS = {  # files by which a folder without a report is known, and what such a folder is
    COMPARE_NAME: "it is a comparison",
    "sweep.json": "it is a sweep; give the folders of its cells, {path}/*",
    "qtool_export.json": "it is an export; qtool eval {path} -o OUT measures it",
    "qtool.json": "it is a checkpoint; qtool eval {path} -o OUT measures it",
    "state": "it is an unfinished run; the same command continues it",
}


def compare(paths: Iterable[Path]) -> Comparison:
    """Compare the runs in ``paths``: folders with a ``report.json``, or such files, in any order.

    Other folders, and other files than ``report.json`` that hold no report, are named in ``left_out``.

    Raises:
        InputError: Names every path that does not exist, has a damaged report, or is given twice; or there is no
            report at all.
    """
    paths = list(paths)
    faults: list[str] = []
    left_out: list[str] = []
    reports: dict[Path, Report] = {}
    for path in paths:
        file = path / JSON_NAME if path.is_dir() else path
        try:
            reports[path] = reading.read_typed(file, Report, "name another one")
        except FileNotFoundError as error:
            if path.is_dir():
                left_out.append(f"{path} has no {JSON_NAME}: {_kind(path)}")
            else:
                faults.append(f"{path} cannot be read: {error.strerror}")
        except InputError as error:
            what = f"{file} is not a report of a qtool run"
            if file.name == JSON_NAME:
                faults.append(f"{what}: it {str(error).removeprefix(f'{file} ')}")
            else:
                left_out.append(what)
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            faults.append(f"{path} is given {count} times")
    if not paths:
        faults.append("no run was given; name folders with a report.json")
    elif not reports and not faults:
        faults = left_out
    if faults:
        raise InputError(listing("these runs cannot be compared:", faults))
    names = _names(list(reports))
    files = [path / JSON_NAME if path.is_dir() else path for path in reports]
    found = dict(zip(names, reports.values(), strict=True))
    return comparison(found, dict(zip(names, files, strict=True)), left_out)


def _kind(folder: Path) -> str:
    """Return what a folder without a report is, as far as its files say."""
    for name, what in KINDS.items():
        if (folder / name).exists():
            return what.format(path=folder)
    return "a run (qtool ptq, qat, ...) or qtool eval -o writes one"


def _names(paths: list[Path]) -> list[str]:
    """Return the shortest ends of the paths that are all different, to name the runs by."""
    parts = [(path if path.is_dir() or path.name != JSON_NAME else path.parent).resolve().parts for path in paths]
    depth = next(
        (depth for depth in range(1, max(map(len, parts))) if len({p[-depth:] for p in parts}) == len(parts)), None
    )
    return [
        printable(str(path) if depth is None else "/".join(p[-depth:])) for path, p in zip(paths, parts, strict=True)
    ]
