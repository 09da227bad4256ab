"""The figure of the weights on disk: the float and the quantized model, divided into the parts of the files."""

from collections.abc import Sequence

from matplotlib.patches import Patch

from qtool.reports import parts
from qtool.reports.drawing import LIGHT, Plot, blank, shortened
from qtool.reports.report import Report
from qtool.system.units import file_size

KINDS = {  # kinds of parts: their colours, and their names in the legend
    "linears": ("accent", "linears"),
    "float linears": ("bad", "float linears"),
    "embedding": ("second", "embedding"),
    "head": ("good", "head"),
    "other": ("muted", "other tensors"),
}
Bar = tuple[str, Sequence[tuple[str, int]]]  # name, and the kind and bytes of each part


def draw_sizes(report: Report) -> Plot | None:
    """Draw a bar for the weight files of the float model, of the quantized one and of each export."""
    if report.quantized_bytes is None or report.float_bytes is None:
        return None
    found = parts.of_file(report)
    quantized = [(part.kind, part.num_bytes) for part in found] or [("linears", report.quantized_bytes)]
    bars: list[Bar] = [("float", _float_parts(report)), ("quantized", quantized)]
    bars += [(f"as {export.format}", [("linears", export.num_bytes)]) for export in report.exports]
    divided = len(found) > 0
    figure, (axes,) = blank(0.3 + 0.32 * len(bars) + 0.3 * divided)
    largest = max(sum(size for _, size in each) for _, each in bars)
    for row, (_, each) in enumerate(bars):
        left = 0
        for kind, size in each:
            plain = len(each) == 1 and divided  # an export, whose parts are not known
            axes.barh(row, size, left=left, height=0.62, color=LIGHT["line" if plain else KINDS[kind][0]])
            left += size
        axes.text(left + 0.012 * largest, row, file_size(left), va="center")
    axes.set_yticks(range(len(bars)), [shortened(name, 26) for name, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(largest, 1) * 1.25)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    if divided:
        kinds = {kind for _, each in bars[:2] for kind, _ in each}
        shown = [name for name in KINDS if name in kinds]
        handles = [Patch(color=LIGHT[KINDS[kind][0]], label=KINDS[kind][1]) for kind in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), columnspacing=1, handlelength=1)
    said = ", ".join(f"{name} {file_size(sum(size for _, size in each))}" for name, each in bars)
    of_file = ", ".join(f"{part.name} {file_size(part.num_bytes)}" for part in found)
    return Plot("size", "Weights on disk", figure, f"{said}." + (f" Quantized: {of_file}." if divided else ""))


def _float_parts(report: Report) -> list[tuple[str, int]]:
    """Return kinds and bytes of the parts of the float model's files, each at the average bits of their weights."""
    total, found = report.float_bytes or 0, parts.of_file(report)
    whole = report.file_bits_per_weight
    if not found or not whole or not report.quantized_bytes:
        return [("linears", total)]
    each_weight = whole * total / report.quantized_bytes / 8  # bytes
    known = [(part.kind, round(part.num_weights * each_weight)) for part in found if part.num_weights]
    return [*known, ("other", max(0, total - sum(size for _, size in known)))]
