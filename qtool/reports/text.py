"""Numbers, percentages, names and notes as text."""

import math
from collections.abc import Mapping

from qtool.reports.records import Published, TaskResult

PUBLISHED_COLUMNS = ("published", "ours", "difference", "source")


def metric_name(task: str, metric: str) -> str:
    """Return ``wikitext2 perplexity``, or only ``kl`` if task and metric have the same name."""
    return task if task == metric else f"{task} {metric}"


def published_cells(row: Published) -> list[str]:
    """Return a cell for each of ``PUBLISHED_COLUMNS``."""
    ours = "not measured" if row.measured is None else number(row.measured, row.stderr)
    source = "; ".join(part for part in (row.source, row.note) if part)
    return [f"{row.value:.6g}", ours, number(row.difference, None, sign="+"), source]


def note_of(row: TaskResult) -> str:
    """Return the settings of a row's measurement, and its note."""
    parts = [
        "" if row.num_fewshot is None else f"{row.num_fewshot}-shot",
        _limit(row),
        row.note,
    ]
    return "; ".join(part for part in parts if part)


def _limit(row: TaskResult) -> str:
    if row.limit is None:
        return ""
    return f"limit {row.limit}" + (f" for each of {row.num_subtasks} subtasks" if row.num_subtasks else "")


def percent(share: float, stderr: float | None) -> str:
    """Return ``+2.1 % ± 0.3 %``, with at least one digit of the standard error."""
    if not math.isfinite(share):
        return str(share)
    if stderr is None or not math.isfinite(stderr):
        return f"{100 * share:+.2f} %"
    decimals = 2 if stderr == 0 else min(4, max(1, -math.floor(math.log10(100 * stderr))))
    return f"{100 * share:+.{decimals}f} % ± {100 * stderr:.{decimals}f} %"


def bits(value: float | None) -> str:
    """Return bits per weight with three decimals; empty if unknown."""
    return "" if value is None else f"{value:.3f}"


def megabytes(num_bytes: float | None) -> str:
    """Return a size in MB, without the unit; empty if unknown."""
    return "" if num_bytes is None else f"{num_bytes / 1e6:.2f}"


def relative(squared: float) -> float:
    """Return the root of a recorded squared relative error, in percent."""
    return 100 * math.sqrt(squared) if squared >= 0 else math.nan


def number(value: float | None, stderr: float | None, sign: str = "") -> str:
    """Return ``34.07 ± 0.41``: two decimals, or more if the standard error is small."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    if stderr is None or not math.isfinite(stderr):
        digits = ".4g" if abs(value) < 1e4 else ",.0f" if abs(value) < 1e6 else ".3e"
        return f"{value:{sign}{digits}}"
    decimals = 4 if stderr == 0 else min(6, max(2, 1 - math.floor(math.log10(stderr))))
    return f"{value:{sign}.{decimals}f} ± {stderr:.{decimals}f}"


def rate(per_second: float) -> str:
    """Return tokens per second with three digits or more."""
    return f"{per_second:.{0 if per_second >= 100 else 1 if per_second >= 10 else 2}f}"


def machine_in_words(machine: Mapping[str, str]) -> str:
    """Return what ``system.environment.machine`` found, in one line."""
    words = {"processor": "{}", "cores": "{} cores", "memory": "{} memory", "GPU": "GPU {}"}
    return ", ".join(words.get(name, f"{name} {{}}").format(text) for name, text in machine.items())
