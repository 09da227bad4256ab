"""Quality against size: which runs no other run beats in both, and the figure that shows them.

A run is on the front when no other is at least as good and at least as small, and better in one of the two. Errors play
no part in that; the figure shows them as bars.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from qtool.drawing import LIGHT, Plot, blank, shortened, style

OFFSETS = [  # of a label from its point, in units of the figure, and how it is aligned there
    (6, 5, "left", "bottom"),
    (6, -5, "left", "top"),
    (-6, 5, "right", "bottom"),
    (-6, -5, "right", "top"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (12, 14, "left", "bottom"),
    (12, -14, "left", "top"),
    (-12, 14, "right", "bottom"),
    (-12, -14, "right", "top"),
]


class Point(NamedTuple):
    """A run in the plane."""

    number: int  # in the table, from 1
    name: str
    x: float  # size: smaller is better
    y: float  # quality
    error: float | None  # standard error of ``y``


def front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The points that no other beats, by size; equal ones are all on it."""
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


def plot(
    name: str, points: Sequence[Point], x_label: str, y_label: str, higher_is_better: bool, reference: float | None
) -> Plot:
    """The figure; ``reference`` is the float model's number, a line across."""
    best = front(points, higher_is_better)
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
        better = "higher" if higher_is_better else "lower"
        axes.set_title(f"{shortened(y_label, 40)}, {better} is better")
        axes.set_xlabel(f"{x_label}, less is better")
        if reference is not None:
            axes.axhline(reference, color=LIGHT["second"], linewidth=1.1, linestyle="--", zorder=0.5)
            place: dict[str, Any] = {"color": LIGHT["second"], "ha": "right", "va": "bottom", "fontsize": 8}
            axes.annotate("float", (1, reference), (-2, 2), ("axes fraction", "data"), "offset points", **place)
        unlabelled = label(axes, points)
    caption = "The line joins the runs that no other beats in both: the Pareto front. Bars are one standard error."
    if unlabelled:
        caption += f" No room for the names of {len(unlabelled)} points: the table has all."
    said = "; ".join(f"{point.name} {point.x:.4g}, {point.y:.5g}" for point in points)
    text = f"On the front: {', '.join(point.name for point in best)}. All runs: {said}."
    return Plot(name, f"{y_label.partition(':')[0]} against {x_label}", figure, text, caption)


def label(axes: Axes, points: Sequence[Point]) -> list[Point]:
    """Write each name beside its point where it covers nothing, else its number; returns those with no room at all."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined] # Agg has one
    inside = axes.get_window_extent(renderer)
    taken = [text.get_window_extent(renderer) for text in axes.texts]
    for point in points:
        x, y = axes.transData.transform((point.x, point.y))
        taken.append(Bbox.from_extents(x - 4, y - 4, x + 4, y + 4))
    unlabelled = []
    for point in points:
        tries = [
            (text, place)
            for text in (f"{point.number} {shortened(point.name, 30)}", str(point.number))
            for place in OFFSETS
        ]
        for text, (dx, dy, ha, va) in tries:
            where: dict[str, Any] = {"ha": ha, "va": va, "fontsize": 8}
            drawn = axes.annotate(text, (point.x, point.y), (dx, dy), textcoords="offset points", **where)
            drawn.set_in_layout(False)
            box = drawn.get_window_extent(renderer)
            if inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1:  # noqa: SIM102
                if not box.count_overlaps(taken):
                    taken.append(box)
                    break
            drawn.remove()
        else:
            unlabelled.append(point)
    return unlabelled
