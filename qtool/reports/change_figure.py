"""The figure of what quantization cost: the loss of each task against the float model, around zero."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, SymmetricalLogLocator

from qtool.reports.drawing import LIGHT, MAX_TICKS, WIDE, Plot, blank, shortened
from qtool.reports.quality import change, loss
from qtool.reports.report import Report
from qtool.reports.text import metric_name
from qtool.reports.verdict import CLASSES, SIGMAS

LOSSLESS = 100 * CLASSES[1][0]  # percent; what is nearer to zero is nearly lossless
CAPTION = (
    "Loss relative to the float model, in percent; of KL divergence in nats, times 100. Bars are "
    f"{SIGMAS} standard errors to each side; the band is the range of losses that count as {CLASSES[1][1]}. The "
    "numbers are the changes of the metrics themselves, with one standard error."
)


def draw_changes(report: Report) -> Plot | None:
    """Draw the loss of each row that was compared with a float model, with its error."""
    rows = [(row, found) for row in report.shown() if (found := loss(row)) is not None and math.isfinite(found[0])]
    if not rows:
        return None
    figure, (axes,) = blank(0.75 + 0.42 * len(rows))
    losses = [100 * value for _, (value, _) in rows]
    bars = [100 * SIGMAS * error if error is not None and math.isfinite(error) else 0.0 for _, (_, error) in rows]
    wide = _scale(axes, losses, bars)
    said = []
    for at, ((row, _), value, bar) in enumerate(zip(rows, losses, bars, strict=True)):
        _lane(axes, at)
        axes.errorbar([value], [at], xerr=bar or None, fmt="o", color=LIGHT["accent"], capsize=3, markersize=5)
        name = metric_name(row.task, row.metric)
        place = {"transform": axes.get_yaxis_transform(), "va": "bottom"}
        axes.text(0.0, at - 0.2, shortened(name, 34), **place)  # type: ignore[arg-type] # values of many kinds
        axes.text(1.0, at - 0.2, change(row), ha="right", **place)  # type: ignore[arg-type]
        said.append(f"{name} {change(row)}")
    axes.set_ylim(len(rows) - 0.6, -0.9)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("loss, % (negative: better)" + (", logarithmic" if wide else ""))
    return Plot("changes", "Loss against the float model", figure, "; ".join(said) + ".", CAPTION)


def _lane(axes: Axes, at: int) -> None:
    """Draw grid lines, zero and the band behind the bar of a row only: names and numbers stand between the rows."""
    low, high = at - 0.14, at + 0.32
    axes.fill_betweenx([low, high], -LOSSLESS, LOSSLESS, color=LIGHT["line"], alpha=0.45, linewidth=0)
    axes.vlines(axes.get_xticks(), low, high, color=LIGHT["line"], linewidth=0.6)
    axes.vlines(0, low, high, color=LIGHT["muted"], linewidth=0.8)


def _scale(axes: Axes, losses: Sequence[float], bars: Sequence[float]) -> bool:
    """Set the horizontal axis, with zero in it; it is logarithmic outside ``LOSSLESS`` if the losses spread widely."""
    low = min(-1.2 * LOSSLESS, *(value - bar for value, bar in zip(losses, bars, strict=True)))
    high = max(1.2 * LOSSLESS, *(value + bar for value, bar in zip(losses, bars, strict=True)))
    sizes = [max(abs(value), LOSSLESS) for value in losses]
    wide = max(sizes) > WIDE * min(sizes)
    if wide:
        axes.set_xscale("symlog", linthresh=LOSSLESS, linscale=0.5)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=LOSSLESS))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(1.6 * low, 1.6 * high)
    else:
        margin = 0.04 * (high - low)
        axes.set_xlim(low - margin, high + margin)
        axes.locator_params(axis="x", nbins=MAX_TICKS)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    return wide
