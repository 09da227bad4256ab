"""The figures of a report; a figure is drawn only if its numbers were measured.

Errors are recorded as squares and shown as their root, ``|q - f| / |f|`` in percent.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from qtool.reports.change_figure import draw_changes
from qtool.reports.drawing import (
    LIGHT,
    MAX_TICKS,
    Plot,
    blank,
    freeze_layout,
    log_if_wide,
    shortened,
    style,
    text_on,
    whole_numbers,
)
from qtool.reports.expert_figure import draw_coverage
from qtool.reports.records import Linear, Series
from qtool.reports.report import Report
from qtool.reports.size_figure import draw_sizes
from qtool.reports.text import relative
from qtool.system.units import duration, size

MAX_POINTS = 400  # points per curve; if there are more steps, each point is the mean of several
DIGIT_WIDTH = 5.8  # width of the widest digit, in points
LINEAR_NAME = re.compile(r"^(.*?)\.(\d+)\.(.+)$")  # prefix, index of the block, name in the block
FLOAT_COLOUR = "#5f6b7a"
BIT_COLOURS = {
    1: "#7a0019",
    2: "#b42318",
    3: "#b54708",
    4: "#175cd3",
    5: "#0e7090",
    6: "#087443",
    7: "#7a3e9d",
    8: "#5925dc",
}
LinearMap = dict[tuple[str, int], Linear]  # by name in the block and index of the block


def draw(report: Report) -> list[Plot]:
    """Draw every figure that the report has numbers for."""
    with style():
        drawn = [plot for drawer in DRAWERS if (plot := drawer(report)) is not None]
        for plot in drawn:
            freeze_layout(plot.figure)
    return drawn


def linear_map(linears: Iterable[Linear]) -> LinearMap:
    """Return the linears by name in their block and index of the block; others are left out."""
    found = {}
    for linear in linears:
        if (place := LINEAR_NAME.match(linear.name)) is not None:
            found[place[3], int(place[2])] = linear
    return found


def blocks_and_parts(linears: LinearMap) -> tuple[list[int], list[str]]:
    """Return the indices of the blocks, and the names of the linears in a block, in model order."""
    return sorted({block for _, block in linears}), list(dict.fromkeys(part for part, _ in linears))


def by_block(report: Report, name: str) -> tuple[float, ...]:
    """A series with one number for each block, or nothing."""
    values = next((each.values for each in report.series if (each.name, each.per) == (name, "block")), ())
    return values if any(map(math.isfinite, values)) else ()


def curves(report: Report) -> list[tuple[Series, Series | None]]:
    """The losses by step of each training of the whole model, and those of its validations."""
    validations = {each.name: each for each in report.series if each.per == "validation"}
    return [(each, validations.get(each.name)) for each in report.series if each.per == "step" and len(each.values) > 1]


def _bits(report: Report) -> Plot | None:
    linears = linear_map(report.linears)
    if not linears:
        return None
    counts: dict[int | None, int] = {}
    for linear in linears.values():
        counts[linear.num_bits] = counts.get(linear.num_bits, 0) + 1
    known = sorted(counts, key=lambda bits: math.inf if bits is None else bits)
    figure, _ = _draw_linears(
        linears,
        lambda linear: _bits_colour(linear.num_bits),
        lambda linear: "f" if linear.num_bits is None else str(linear.num_bits),
        below=0.3,
    )
    names = {bits: "f: float" if bits is None else f"{bits} bits" for bits in known}
    handles = [Patch(color=_bits_colour(bits), label=f"{names[bits]} ({counts[bits]})") for bits in known]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    said = ", ".join(f"{counts[bits]} in {'float' if bits is None else f'{bits} bits'}" for bits in known)
    return Plot("bits", "Bits of each linear", figure, f"Of {len(linears)} linears {said}.")


def _bits_colour(num_bits: int | None) -> str:
    return FLOAT_COLOUR if num_bits is None else BIT_COLOURS.get(num_bits, FLOAT_COLOUR)


def _errors(report: Report) -> Plot | None:
    linears = linear_map(report.linears)
    known = {
        place: relative(linear.weight_error) for place, linear in linears.items() if linear.weight_error is not None
    }
    finite = [error for error in known.values() if math.isfinite(error)]
    if not finite:
        return None
    scale = Normalize(min(finite), max(finite))
    colours: Any = matplotlib.colormaps["cividis"].resampled(48)  # Any: matplotlib's stub of the call takes no float
    places = {id(linear): place for place, linear in linears.items()}

    def colour(linear: Linear) -> str | None:
        error = known.get(places[id(linear)])
        return None if error is None else _hex(colours(scale(error))) if math.isfinite(error) else LIGHT["bad"]

    def text(linear: Linear) -> str:
        error = known.get(places[id(linear)])
        return "" if error is None else f"{error:.1f}" if error < 99.95 else f"{error:.0f}"

    figure, axes = _draw_linears(linears, colour, text, below=0.45)
    mappable = matplotlib.cm.ScalarMappable(scale, colours)
    bar = figure.colorbar(
        mappable, ax=axes, orientation="horizontal", ticks=MaxNLocator(MAX_TICKS), aspect=45, pad=0.03, fraction=0.06
    )
    bar.set_label("|Q(w) - w| / |w|, %")
    bar.outline.set_visible(False)
    worst = max(known, key=lambda place: known[place] if math.isfinite(known[place]) else math.inf)
    said = f"{len(known)} linears, {min(finite):.2f} % to {max(finite):.2f} %; worst: {worst[0]} of block {worst[1]}."
    return Plot("weight-errors", "Weight error of each linear, %", figure, said, said)


def _blocks(report: Report) -> Plot | None:
    errors = [relative(error) for error in by_block(report, "block_error")]
    if not errors:
        return None
    figure, (axes,) = blank(2.1)
    axes.plot(range(len(errors)), errors, "o-", color=LIGHT["accent"], markersize=4, linewidth=1.2)
    finite = [error for error in errors if math.isfinite(error)]
    if not log_if_wide(axes, errors):
        axes.set_ylim(0, 1.12 * max(finite) or 1)
    axes.set_xlabel("block")
    axes.set_ylabel("relative error, %")
    axes.grid(axis="y")
    whole_numbers(axes)
    said = f"{len(errors)} blocks, {min(finite):.2f} % to {max(finite):.2f} %, the last one {errors[-1]:.2f} %."
    caption = (
        "Root of the mean square of q(x) - f(x), of each token and channel relative to its size in f(x). Quantized "
        "block q and float block f read the same x, the output of the quantized blocks before them."
    )
    return Plot("block-errors", "Output error of each block", figure, said, caption)


def _loss(report: Report) -> Plot | None:
    found = curves(report)
    if not found:
        return None
    figure, all_axes = blank(2.1 * len(found), len(found))
    said = []
    for (training, validation), axes in zip(found, all_axes, strict=True):
        name, losses = training.name, training.values
        width = math.ceil(len(losses) / MAX_POINTS)
        steps = [1 + start + (min(width, len(losses) - start) - 1) / 2 for start in range(0, len(losses), width)]
        means = [math.fsum(part := losses[i : i + width]) / len(part) for i in range(0, len(losses), width)]
        label = "training" if width == 1 else f"training, mean of each {width} steps"
        axes.plot(steps, means, color=LIGHT["accent"], linewidth=1.1, label=label)
        said.append(f"{name}: {len(losses)} steps, from {losses[0]:.4g} to {losses[-1]:.4g}")
        if validation is not None:
            held = validation.values
            style_ = {"color": LIGHT["second"], "markersize": 4, "linewidth": 1, "label": "validation"}
            axes.plot(validation.at, held, "D--", **style_)  # type: ignore[arg-type] # values of many kinds
            said[-1] += f"; validation from {held[0]:.4g} to {min(held):.4g} at its best"
        log_if_wide(axes, [*means, *(() if validation is None else validation.values)])
        axes.set_xlabel("step")
        axes.set_ylabel("loss" if len(found) == 1 else name)
        axes.grid(axis="y")
        axes.legend(loc="upper right")
        whole_numbers(axes)
    return Plot("loss", "Loss of training", figure, "; ".join(said) + ".")


def _phases(report: Report) -> Plot | None:
    if not report.seconds:
        return None
    panels: list[tuple[str, dict[str, Any], str, Callable[[float], str]]] = [
        ("time", report.seconds, "accent", duration),
        ("peak memory up to the end of the phase", report.peak_bytes, "second", size),
        ("peak GPU memory up to the end of the phase", report.peak_gpu_bytes, "second", size),
    ]
    panels = [panel for panel in panels if panel[1]]
    lines = sum(len(values) + 1.6 for _, values, _, _ in panels)
    ratios = [len(values) + 1.0 for _, values, _, _ in panels]
    figure, all_axes = blank(0.2 + 0.24 * lines, len(panels), ratios)
    said = []
    for (title, values, colour, shown), axes in zip(panels, all_axes, strict=True):
        _bars(axes, [(name, value, colour) for name, value in values.items()], shown)
        axes.set_title(title)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        said.append(f"{title}: " + ", ".join(f"{name} {shown(value)}" for name, value in values.items()))
    return Plot("phases", "Time and memory", figure, "; ".join(said) + ".")


DRAWERS = (draw_changes, draw_sizes, _bits, _errors, _blocks, draw_coverage, _loss, _phases)


def _bars(axes: Axes, bars: Sequence[tuple[str, float, str]], shown: Callable[[float], str]) -> None:
    """Draw horizontal bars from top to bottom, each followed by its number."""
    names, values, colours = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), values, color=[LIGHT[name] for name in colours], height=0.62)
    axes.bar_label(drawn, [shown(value) for value in values], padding=4)
    axes.set_yticks(range(len(bars)), [shortened(name, 26) for name in names])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(max(values), 1e-9) * 1.25)


def _draw_linears(
    linears: LinearMap, colour: Callable[[Linear], str | None], text: Callable[[Linear], str], below: float
) -> tuple[Any, Axes]:
    """Draw a cell for each linear: blocks from left to right, the linears of a block from top to bottom.

    ``below`` is the height of a legend in inches.
    """
    blocks, parts = blocks_and_parts(linears)
    figure, (axes,) = blank(0.55 + below + 0.235 * len(parts))
    axes.set_xlim(0, len(blocks))
    axes.set_ylim(len(parts), 0)
    axes.set_yticks([i + 0.5 for i in range(len(parts))], [shortened(part, 26) for part in parts])
    figure.draw_without_rendering()  # measures the room that the names leave
    width = 72 / figure.dpi * axes.get_window_extent().width / len(blocks)  # width of a cell, in points
    texts = {place: text(linear) for place, linear in linears.items()}
    fits = DIGIT_WIDTH * max(map(len, texts.values())) <= width
    every = math.ceil((DIGIT_WIDTH * len(str(blocks[-1])) + 4) / width)
    axes.set_xticks([i + 0.5 for i in range(0, len(blocks), every)], [str(block) for block in blocks[::every]])
    for (part, block), linear in linears.items():
        column, row, fill = blocks.index(block), parts.index(part), colour(linear)
        if fill is None:
            continue
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=fill, edgecolor=LIGHT["panel"], linewidth=0.7))
        if fits:
            style_ = {"ha": "center", "va": "center", "fontsize": 8, "color": text_on(_rgb(fill))}
            axes.text(column + 0.5, row + 0.5, texts[part, block], **style_)  # type: ignore[arg-type]
    axes.tick_params(length=0)
    axes.set_xlabel("block")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _hex(colour: tuple[float, float, float, float]) -> str:
    return matplotlib.colors.to_hex(colour)


def _rgb(colour: str) -> tuple[float, float, float]:
    return matplotlib.colors.to_rgb(colour)
