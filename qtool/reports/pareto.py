"""Quality against size: the Pareto front of several runs, and its figure.

A run is on the front if no other run is at least as good and at least as small, and better in one of the two. Standard
errors do not matter for that; the figure shows them as bars.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from qtool.reports.drawing import LIGHT, Plot, blank, freeze_layout, shortened, style
from qtool.reports.measures import ComparedRun, Measure, weight_bytes

LABEL_OFFSETS = [  # offsets of a label from its point, in points, and its alignment; tried in this order
    (6, 5, "left", "bottom"),
    (6, -5, "left", "top"),
    (-6, 5, "right", "bottom"),
    (-6, -5, "right", "top"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 18, "center", "bottom"),
    (0, -18, "center", "top"),
    (12, 14, "left", "bottom"),
    (12, -14, "left", "top"),
    (-12, 14, "right", "bottom"),
    (-12, -14, "right", "top"),
]


LOG_SPREAD = 5  # an axis whose largest number is more than so many times the smallest is logarithmic
FEW_DECADES = 100
LABEL_GAP = 5  # least distance of two labels in a line, in pixels of the figure's canvas
CALLOUT_DISTANCE = 10  # in points; a label further from its point gets a line to it
FLOAT_LABEL_PLACES = (  # places of "float" on the float model's line: fraction of its length, offset, alignment
    (1.0, -2, "right"),
    (0.0, 2, "left"),
)


class Point(NamedTuple):
    """A run in the plane of size and quality."""

    number: int  # number of the run in the table, from 1
    name: str
    x: float  # size: smaller is better
    y: float  # quality
    error: float | None  # standard error of ``y``


def front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """Return the points that no other point beats, by size; of equal points all are on the front."""
    sign = -1 if higher_is_better else 1
    found: list[Point] = []
    best = math.inf
    for point in sorted(points, key=lambda p: (p.x, sign * p.y)):
        cost = sign * point.y
        twin = bool(found) and (found[-1].x, found[-1].y) == (point.x, point.y)
        if cost < best or twin:
            found.append(point)
            best = cost
    return found


class Plane(NamedTuple):
    """The meaning of the axes."""

    size: str
    quality: str
    higher_is_better: bool
    reference: float | None  # the float model's quality
    paired: bool = False  # True if errors are those of the change against the float model


def plot(name: str, points: Sequence[Point], plane: Plane) -> Plot:
    """Draw the figure; the float model is a horizontal line."""
    best = front(points, plane.higher_is_better)
    with style():
        figure, (axes,) = blank(3.3)
        on = {point.number for point in best}
        for colour, chosen in (("muted", [p for p in points if p.number not in on]), ("accent", best)):
            for point in chosen:
                bars: dict[str, Any] = {"color": LIGHT[colour], "capsize": 3, "markersize": 5.5, "elinewidth": 0.9}
                axes.errorbar([point.x], [point.y], yerr=point.error, fmt="o", **bars)
        steps = [(point.x, point.y) for point in best]
        axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=LIGHT["accent"], linewidth=1.1, zorder=1)
        axes.margins(0.16)
        axes.grid()
        ys = [point.y for point in points] + ([] if plane.reference is None else [plane.reference])
        if sizes_log := _wide([point.x for point in points]):
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis, [point.x for point in points])
        if quality_log := _wide(ys):
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis, ys)
        better = "higher" if plane.higher_is_better else "lower"
        axes.set_title(f"{shortened(plane.quality, 40)}, {better} is better")
        axes.set_xlabel(f"{plane.size}, lower is better")
        if plane.reference is not None:
            axes.axhline(plane.reference, color=LIGHT["second"], linewidth=1.1, linestyle="--", zorder=0.5)
        unlabelled = place_labels(axes, points, best, plane.reference)
    caption = "The line is the Pareto front: runs that no other run beats in both size and quality. "
    caption += "Error bars are one standard error" + (
        " of the change against the float model." if plane.paired else "."
    )
    if sizes_log or quality_log:
        which = (
            "Both axes are" if sizes_log and quality_log else f"The axis of {'sizes' if sizes_log else 'quality'} is"
        )
        caption += f" {which} logarithmic."
    if unlabelled:
        caption += f" No room for the names of {len(unlabelled)} points: see the table."
    said = "; ".join(f"{point.name} {point.x:.4g}, {point.y:.5g}" for point in points)
    text = f"On the Pareto front: {', '.join(point.name for point in best)}. All runs: {said}."
    return Plot(name, f"{plane.quality} against {plane.size}", figure, text, caption)


def _wide(values: Sequence[float]) -> bool:
    """Return whether the spread of ``values`` asks for a logarithmic axis."""
    return min(values) > 0 and max(values) > LOG_SPREAD * min(values)


def _plain_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Put ticks of a logarithmic axis at powers of ten, or at 1, 2 and 5 times these, as plain numbers."""
    few = max(values) < FEW_DECADES * min(values)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def figures(runs: Sequence[ComparedRun], measure: Measure, title: str) -> list[Plot]:
    """Draw quality, by ``measure`` called ``title``, against bits per weight and against size on disk."""
    rows = {run.name: run.results[measure] for run in runs if measure in run.results}
    higher = any(row.higher_is_better for row in rows.values())
    floats = {_finite(row.float_value) for row in rows.values()}
    reference = floats.pop() if len(floats) == 1 else None
    paired = reference is not None and all(_finite(row.delta_stderr) is not None for row in rows.values())
    drawn = []
    largest = max((weight_bytes(run.report) or 0 for run in runs), default=0)
    unit, scale = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    for name, axis, of in (
        ("pareto-bits", "bits per weight", lambda report: report.bits_per_weight),
        ("pareto-size", f"{unit} on disk", lambda report: None if (b := weight_bytes(report)) is None else b / scale),
    ):
        points = [
            Point(index + 1, run.name, x, y, _finite(row.delta_stderr if paired else row.stderr))
            for index, run in enumerate(runs)
            if (row := rows.get(run.name))
            and (y := _finite(row.value)) is not None
            and (x := of(run.report)) is not None
        ]
        if len(points) > 1:
            drawn.append(plot(name, points, Plane(axis, title, higher, reference, paired)))
    return drawn


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def place_labels(axes: Axes, points: Sequence[Point], best: Sequence[Point], reference: float | None) -> list[Point]:
    """Write each point's name, else its number, where it covers nothing; return the points with room for neither."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    freeze_layout(figure)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined] # the canvas is Agg's, which has one
    inside = axes.get_window_extent(renderer)
    taken = list(_occupied(axes, points, best, reference))

    def write(text: str, place: tuple[float, float], offset: tuple[float, float, str, str], **options: Any) -> bool:
        dx, dy, ha, va = offset
        options |= {"ha": ha, "va": va, "fontsize": 8, "textcoords": "offset points"}
        if math.hypot(dx, dy) > CALLOUT_DISTANCE:
            options["arrowprops"] = {"arrowstyle": "-", "color": LIGHT["muted"], "linewidth": 0.6, "shrinkB": 4}
        drawn = axes.annotate(text, place, (dx, dy), **options)
        drawn.set_in_layout(False)
        drawn.update_positions(renderer)
        box = Text.get_window_extent(drawn, renderer)  # the box of the text without the line to its point
        fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if fits and not box.count_overlaps(taken):
            taken.append(box.padded(LABEL_GAP, 0))
            return True
        drawn.remove()
        return False

    unlabelled = []
    for point in points:
        texts = f"{point.number} {shortened(point.name, 30)}", str(point.number)
        if not any(write(text, (point.x, point.y), offset) for text in texts for offset in LABEL_OFFSETS):
            unlabelled.append(point)
    if reference is not None:
        sides = [(x, (dx, dy, ha, va)) for dy, va in ((2, "bottom"), (-2, "top")) for x, dx, ha in FLOAT_LABEL_PLACES]
        any(
            write("float", (x, reference), at, xycoords=("axes fraction", "data"), color=LIGHT["second"])
            for x, at in sides
        )
    return unlabelled


def _occupied(axes: Axes, points: Sequence[Point], best: Sequence[Point], reference: float | None) -> Iterator[Bbox]:
    """Yield the boxes, in pixels, of the points, error bars, the front and the float model's line."""

    def box(low: tuple[float, float], high: tuple[float, float], wide: float) -> Bbox:
        (x0, y0), (x1, y1) = axes.transData.transform([low, high])
        return Bbox.from_extents(min(x0, x1) - wide, min(y0, y1) - wide, max(x0, x1) + wide, max(y0, y1) + wide)

    for x, y, error in ((point.x, point.y, point.error or 0.0) for point in points):
        yield box((x, y), (x, y), 4)
        yield box((x, y - error), (x, y + error), 3)
    for left, right in pairwise(best):
        yield box((left.x, left.y), (right.x, left.y), 1)
        yield box((right.x, left.y), (right.x, right.y), 1)
    if reference is not None:
        low, high = axes.get_xlim()
        yield box((low, reference), (high, reference), 1)
