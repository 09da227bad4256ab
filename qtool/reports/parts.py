"""The parts of the weight files of a report: the linears, the embeddings and the head, and all other tensors."""

from collections.abc import Sequence
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from qtool.reports import text
from qtool.reports.document import Table
from qtool.reports.records import ModelTable
from qtool.system.units import file_size

if TYPE_CHECKING:
    from qtool.reports.report import Report

MIN_SHARE = 0.05  # of the file; smaller parts are no reason for its size
KEYS = "quant.embedding", "quant.head"  # recipe keys of the grids of embeddings, and of an untied head


class Part(NamedTuple):
    """A part of the weight files."""

    kind: str  # linears, float linears, embedding, head or other
    name: str
    grid: str  # in floating point the dtype, if it is known
    num_bytes: int
    num_weights: int = 0  # 0: unknown
    bits: float | None = None  # of each weight, scales and zero points included
    weight_error: float | None = None


def of_file(report: "Report") -> list[Part]:
    """Return the parts of the quantized model's weight files; nothing if its embeddings are not known."""
    total = report.quantized_bytes
    if not report.tables or not total or report.bits_per_weight is None:
        return []
    linears = [linear for linear in report.linears if linear.num_bits is not None]
    grids = {linear.grid for linear in linears}
    count = sum(prod(linear.shape) for linear in linears)
    grid = grids.pop() if len(grids) == 1 else "mixed"
    bits = report.bits_per_weight
    found = [Part("linears", "linears", grid, round(bits * count / 8), count, bits)]
    left = [linear for linear in report.linears if linear.float_bytes is not None]
    if left:
        weights, size = (sum(each) for each in zip(*((prod(e.shape), e.float_bytes or 0) for e in left), strict=True))
        found.append(Part("float linears", f"{len(left)} float linears", "float", size, weights, 8 * size / weights))
    for each in report.tables:
        kind = "head" if each.role == "head" else "embedding"
        known = each.num_bytes, prod(each.shape), each.bits_per_weight, each.weight_error
        found.append(Part(kind, each.role, each.grid, *known))
    return [*found, Part("other", "other tensors", "", total - sum(part.num_bytes for part in found))]


def table(report: "Report") -> Table | None:
    """Return the table with a row for each part of the weight files; ``None`` if the embeddings are not known."""
    parts, total = of_file(report), report.quantized_bytes
    if not parts or not total:
        return None
    rows = []
    for part in parts:
        error = "" if part.weight_error is None else f"{text.relative(part.weight_error):.2f} %"
        rows.append(_row(part.name, part.grid, part.bits, part.num_bytes, total, error))
    tables = {each.role for each in report.tables if each.num_bits is not None}
    if packed := [part for part in parts if part.name in tables]:
        packed.append(parts[0])
        weights = sum(part.num_weights for part in packed)
        bits = sum((part.bits or 0) * part.num_weights for part in packed) / weights
        rows.append(_row("all quantized", "", bits, sum(part.num_bytes for part in packed), total))
    rows.append(_row("whole file", "", report.file_bits_per_weight, total, total))
    columns = ["weights on disk", "grid", "bits/weight", "size", "of file", "weight error"]
    width = len(columns) if any(row[-1] for row in rows) else len(columns) - 1
    return Table(columns[:width], [row[:width] for row in rows], "llrrrr"[:width])


def _row(name: str, grid: str, bits: float | None, size: int, total: int, error: str = "") -> list[str]:
    return [name, grid, text.bits(bits), file_size(size), _percent(size, total), error]


def lines(report: "Report") -> list[str]:
    """Return the lines below the table: why the file shrinks less than the linears do, and what stays float."""
    return [*_why_not_smaller(report), *float_lines(report)]


def _why_not_smaller(report: "Report") -> list[str]:
    """Return a line, with what else is in the file, if the file shrinks clearly less than its quantized linears."""
    parts, total, whole = of_file(report), report.quantized_bytes, report.file_bits_per_weight
    if not parts or not total or not whole or not report.float_bytes or not report.bits_per_weight:
        return []
    ratio = report.float_bytes / total
    of_linears = ratio * whole / report.bits_per_weight  # ratio * whole: bits of each weight in the float model's files
    large = [part for part in parts[1:] if part.num_bytes >= MIN_SHARE * total]
    if ratio >= 0.9 * of_linears or not large:
        return []
    others = [
        f"{part.name} {_percent(part.num_bytes, total)}" + (f" ({part.grid})" if part.grid else "") for part in large
    ]
    return [
        f"the quantized linears are {of_linears:.1f} x smaller than in the float model, and the whole file is "
        f"{_ratio(ratio)}, because these linears are {_percent(parts[0].num_bytes, total)} of it; the rest: "
        f"{', '.join(others)}"
    ]


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
    line += f"{file_size(size)} of {file_size(total)}, {_percent(size, total)} of the file"
    small = [each.int8_bytes for each in tables if each.int8_bytes is not None]
    if not small:
        return line
    keys = [f"{key}: {{num_bits: 8}}" for key in dict.fromkeys(KEYS[each.role == "head"] for each in tables)]
    make = "makes" if len(keys) == 1 else "make"
    return f"{line}; {' and '.join(keys)} {make} {'them' if several else 'it'} {file_size(sum(small))}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.1f} x smaller" if ratio >= 1 else f"{1 / ratio:.1f} x larger"


def _percent(size: int, total: int) -> str:
    return f"{100 * size / total:.0f} %"
