"""The parts of the weight files of a report: the linears, the embeddings and the head, and all other tensors."""

from collections.abc import Sequence
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING

from qtool.reports import text
from qtool.reports.document import Table
from qtool.reports.records import ModelTable

if TYPE_CHECKING:
    from qtool.reports.report import Report

KEYS = "quant.embedding", "quant.head"  # recipe keys of the grids of embeddings, and of an untied head


def table(report: "Report") -> Table | None:
    """Return the table with a row for each part of the weight files; ``None`` if the embeddings are not known."""
    total = report.quantized_bytes
    if not report.tables or not total or report.bits_per_weight is None:
        return None
    linears = [linear for linear in report.linears if linear.num_bits is not None]
    grids = {linear.grid for linear in linears}
    count = sum(prod(linear.shape) for linear in linears)
    linear_bytes = round(report.bits_per_weight * count / 8)
    others = total - linear_bytes - sum(each.num_bytes for each in report.tables)
    rows = [_row("linears", grids.pop() if len(grids) == 1 else "mixed", report.bits_per_weight, linear_bytes, total)]
    for each in report.tables:
        error = "" if each.weight_error is None else f"{text.relative(each.weight_error):.2f} %"
        rows.append(_row(each.role, each.grid, each.bits_per_weight, each.num_bytes, total, error))
    rows.append(_row("other tensors", "", None, others, total))
    if packed := [each for each in report.tables if each.num_bits is not None]:
        size = linear_bytes + sum(each.num_bytes for each in packed)
        bits = report.bits_per_weight * count + sum(each.bits_per_weight * prod(each.shape) for each in packed)
        weights = count + sum(prod(each.shape) for each in packed)
        rows.append(_row("all quantized", "", bits / weights, size, total))
    rows.append(_row("whole file", "", report.file_bits_per_weight, total, total))
    columns = ["weights on disk", "grid", "bits/weight", "MB", "of file", "weight error"]
    return Table(columns, rows, "llrrrr")


def _row(name: str, grid: str, bits: float | None, size: int, total: int, error: str = "") -> list[str]:
    return [name, grid, text.bits(bits), text.megabytes(size), _percent(size, total), error]


def float_lines(report: "Report") -> list[str]:
    """Return a line on the embeddings and the head that stay in floating point, with the key that changes it.

    Those that cannot be quantized have a line of their own.
    """
    total = report.quantized_bytes
    floats = [each for each in report.tables if each.num_bits is None]
    if not total:
        return []
    ordered = sorted(floats, key=lambda each: each.int8_bytes is None)
    return [_line(list(alike), total) for _, alike in groupby(ordered, key=lambda each: each.int8_bytes is None)]


def _line(tables: Sequence[ModelTable], total: int) -> str:
    """Return the line on tables that all can be quantized, or none; ``total`` is the size of the weight files."""
    roles = [each.role.removesuffix(" (tied)") for each in tables]
    names = (", " if any(" and " in role for role in roles) else " and ").join(roles)
    several = len(roles) > 1 or " and " in names
    size = sum(each.num_bytes for each in tables)
    line = f"{names} stay{'' if several else 's'} {'/'.join(dict.fromkeys(each.grid for each in tables))}: "
    line += f"{size / 1e6:.2f} of {total / 1e6:.2f} MB, {_percent(size, total)} of the file"
    small = [each.int8_bytes for each in tables if each.int8_bytes is not None]
    if not small:
        return line
    keys = [f"{key}: {{num_bits: 8}}" for key in dict.fromkeys(KEYS[each.role == "head"] for each in tables)]
    make = "makes" if len(keys) == 1 else "make"
    return f"{line}; {' and '.join(keys)} {make} {'them' if several else 'it'} {sum(small) / 1e6:.2f} MB"


def _percent(size: int, total: int) -> str:
    return f"{100 * size / total:.0f} %"
