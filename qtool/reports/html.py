"""``report.html``: a report as one self-contained page, which needs neither network nor other files.

The templates escape every text from outside (names, notes, paths), and show it without control characters and secrets;
only our own figures are inserted as they are.
"""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qtool.reports import model_card, parts, samples, serving
from qtool.reports.bench_report import DENSE, FAST, decode
from qtool.reports.document import Table
from qtool.reports.quality import judge, judgements, loss
from qtool.reports.records import TaskResult
from qtool.reports.report import Report
from qtool.reports.text import PUBLISHED_COLUMNS, metric_name, published_cells, rate, relative
from qtool.reports.verdict import RULE, words
from qtool.system.printable import shown
from qtool.system.units import duration, file_size, size
from qtool.system.version import __version__
from qtool.system.writing import write_text

if TYPE_CHECKING:
    from qtool.reports.drawing import Plot

HTML_NAME = "report.html"
NBSP = "\N{NO-BREAK SPACE}"


def write(folder: Path, report: Report, files: bool = False) -> None:
    """Write ``report.html`` into ``folder``; with ``files`` also write its figures below ``plots``."""
    from qtool.reports import drawing, figures  # imported here because matplotlib takes a while

    plots = figures.draw(report)
    write_text(folder / HTML_NAME, page(report, plots))
    if files and plots:
        drawing.save(plots, folder)


def page(report: Report, plots: Sequence["Plot"]) -> str:
    """Return the page of a report with its figures, ``plots``."""
    return render(
        "report.html",
        plots,
        title=report.title(),
        report=report,
        headline=unbroken(report.headline()),
        tiles=list(_tiles(report)),
        quality=_results(report, report.shown()),
        details=_results(report, [row for row in report.results if row.detail]),
        judged=judge(report.results) is not None,
        rule=RULE,
        same=samples.same,
        linears=_linears(report),
        parts=parts.table(report),
        size_lines=parts.lines(report),
        serving=serving.table(report.bench) if report.bench else None,
        serving_notes=serving.notes(report.bench) if report.bench else [],
        phases=_phases(report),
        published=_published(report),
        evaluating=f"qtool eval {shlex.quote(report.quantized)}" if report.quantized else None,
        loading=model_card.loading_code(report.quantized, report.multimodal)
        if report.quantized and report.method
        else None,
        lock=list(_flat(report.lock.model_dump(mode="json") if report.lock else {})),
    )


def unbroken(text: str) -> str:
    """Return ``text`` with numbers that keep their units and errors their signs; a line may end before ``±``."""
    return re.sub(r"(?<=±) | (?=%|nats)", NBSP, text)


def render(template: str, plots: Sequence["Plot"], **values: Any) -> str:  # Any: the variables of a template
    """Return the page made from ``template`` with the figures ``plots``."""
    from qtool.reports.drawing import COLOURS, inline_svg

    drawn = [
        {"name": plot.name, "title": plot.title, "caption": plot.caption, "svg": Markup(inline_svg(plot))}
        for plot in plots
    ]
    return _templates().get_template(template).render(plots=drawn, colours=COLOURS, version=__version__, **values)


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("qtool.reports"),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: object) -> object:
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _tiles(report: Report) -> Iterator[tuple[str, str, str]]:
    """Yield name, number and remark of the most important numbers."""
    if report.bits_per_weight is not None:
        whole = report.file_bits_per_weight
        of_file = "" if whole is None else f"; whole file {whole:.2f}"
        yield "bits per weight", f"{report.bits_per_weight:.2f}", f"scales and zero points counted{of_file}"
    if report.float_bytes and report.quantized_bytes:
        sizes = f"{file_size(report.float_bytes)} to {file_size(report.quantized_bytes)}"
        yield "size on disk", report.size_ratio(), sizes
    for judged in judgements(report.results):
        remark = ": ".join(part for part in (judged.where, judged.words.partition(" (")[0]) if part)
        yield judged.metric, unbroken(judged.change), remark
    if report.bench is not None:
        speeds = [report.bench.variant(name).speeds[decode(1)].tokens_per_second for name in (DENSE, FAST)]
        yield "speed of decoding", f"{speeds[1] / speeds[0]:.2f} x", f"{rate(speeds[0])} to {rate(speeds[1])} tokens/s"
    if "quantize" in report.seconds:
        held = report.quantize_peak()
        yield "time to quantize", duration(report.seconds["quantize"]), f"peak memory {size(held)}" if held else ""


def _results(report: Report, rows: Sequence[TaskResult]) -> Table:
    words_column = ["in words"] if len(report.columns()) > 1 else []
    columns = ["metric", *report.columns(), *words_column, *_shots(report, "shots"), "n"]
    align = "l" + "r" * len(report.columns()) + "l" * len(words_column) + "rr"
    return Table(columns, [_cells(report, row) for row in rows], align[: len(columns)])


def _shots(report: Report, cell: object) -> list[str]:
    """Return ``cell`` as a list of one; an empty list, for no such column, if no prompt had examples."""
    if all(row.num_fewshot is None for row in report.results):
        return []
    return ["" if cell is None else str(cell)]


def _cells(report: Report, row: TaskResult) -> list[str]:
    found = loss(row)
    said = [] if len(report.columns()) == 1 else [words(*found).partition(" (")[0] if found else ""]
    name = metric_name(row.task, row.metric) + ("" if row.detail else report.mark(row).replace(" ", NBSP))
    n = "" if row.n is None else str(row.n)
    return [name, *report.numbers(row), *said, *_shots(report, row.num_fewshot), n]


def _linears(report: Report) -> Table | None:
    from qtool.reports import figures

    linears = figures.linear_map(report.linears)
    if not linears:
        return None
    blocks, parts = figures.blocks_and_parts(linears)
    rows = []
    for block in blocks:
        cells = [f"block {block}"]
        for part in parts:
            linear = linears.get((part, block))
            bits = "" if linear is None else "float" if linear.num_bits is None else str(linear.num_bits)
            error = None if linear is None else linear.weight_error
            cells.append(bits if error is None else f"{bits} / {relative(error):.2f}")
        rows.append(cells)
    return Table(["", *parts], rows, "l" + "r" * len(parts))


def _phases(report: Report) -> Table | None:
    if not report.seconds:
        return None
    held = {"memory": report.peak_bytes, "GPU memory": report.peak_gpu_bytes}
    held = {name: peaks for name, peaks in held.items() if peaks}
    rows = [
        [phase, duration(taken), *(size(peaks[phase]) if phase in peaks else "" for peaks in held.values())]
        for phase, taken in report.seconds.items()
    ]
    return Table(["phase", "time", *held], rows, "lr" + "r" * len(held))


def _published(report: Report) -> Table | None:
    if not report.expected:
        return None
    rows = [[f"{row.task} {row.metric}", *published_cells(row)] for row in report.expected]
    return Table(("task", *PUBLISHED_COLUMNS), rows, "lllll")


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the value of each entry, at any depth."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value if isinstance(value, str) else json.dumps(value)
