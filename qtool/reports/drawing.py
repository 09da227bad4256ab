"""Drawing: one style for all figures, named colours, and SVG and PNG with the same bytes for the same numbers.

A figure is drawn in the light colours of ``COLOURS``. In an HTML page these become CSS variables, so that the figure
follows the reader's theme; in a file of its own the figure keeps them, on white.
"""

import html
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from qtool.reports.report import PLOTS_FOLDER
from qtool.system.printable import shown
from qtool.system.writing import write_bytes, write_text

WIDTH = 4.6  # inches of 72 units; narrow, so that a phone shows text in its drawn size
PNG_DPI = 200
MAX_TICKS = 6  # ticks per axis; fixed, because a number computed from the layout would change the layout
WIDE = 5  # spread of numbers, as a factor, above which an axis is logarithmic
COLOURS: dict[str, tuple[str, str]] = {  # light, dark
    "page": ("#fdfdfe", "#13161b"),
    "panel": ("#f4f6f8", "#1c2027"),
    "ink": ("#1a1f26", "#e7eaee"),
    "muted": ("#55606d", "#a3adb9"),
    "line": ("#c9d1da", "#3c444f"),
    "accent": ("#0a5cb8", "#79b8ff"),
    "second": ("#9a4a00", "#f2ab66"),
    "good": ("#136b35", "#67d18a"),
    "bad": ("#b3201b", "#ff9088"),
    "notice": ("#fff4d6", "#3a2f12"),
    "notice-ink": ("#5c4300", "#f5d98b"),
}
FIGURE_COLOURS = ("panel", "ink", "muted", "line", "accent", "second", "good", "bad")
LIGHT = {name: COLOURS[name][0] for name in FIGURE_COLOURS}
STYLE: dict[Any, Any] = {  # Any: matplotlib has a type of its own for the keys
    "font.family": "DejaVu Sans",  # part of matplotlib, so the layout is the same on every machine
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a dollar sign in a name is text
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"],
    "legend.frameon": False,
    "svg.fonttype": "none",
}


class Plot(NamedTuple):
    """A figure with its texts."""

    name: str  # stem of the figure's files
    title: str
    figure: Figure
    text: str  # the content in words, for readers who cannot see the figure
    caption: str = ""  # explanation below the figure


@contextmanager
def style() -> Iterator[None]:
    """Use the style of all figures; needed while a figure is made and while it is written.

    A character that the font lacks is drawn as a box in PNG files, and by the reader's own fonts elsewhere: no warning.
    """
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
        yield


def blank(height: float, rows: int = 1, ratios: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    """Return a figure ``height`` inches high with ``rows`` axes below each other, of heights in ``ratios``."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)  # is needed to measure text
    axes = figure.subplots(rows, 1, squeeze=False, height_ratios=ratios)
    for each in axes[:, 0]:
        each.locator_params(nbins=MAX_TICKS)
    return figure, list(axes[:, 0])


def freeze_layout(figure: Figure) -> None:
    """Fix the layout of ``figure``, rounded, because the last digits of matplotlib's solver vary from run to run."""
    engine = figure.get_layout_engine()
    assert engine is not None
    with style():
        engine.execute(figure)  # drawing begins with this, but no drawing is needed
    for axes in figure.axes:
        left, bottom, width, height = (round(float(each), 4) for each in axes.get_position(original=True).bounds)
        axes.set_position((left, bottom, width, height))
    figure.set_layout_engine("none")


def shortened(text: str, length: int) -> str:
    """Shorten ``text`` to ``length`` characters by an ellipsis in front: the ends of names say more than the starts."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def whole_numbers(axes: Axes) -> None:
    """Put the ticks of the horizontal axis at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def log_if_wide(axes: Axes, values: Sequence[float]) -> bool:
    """Make the vertical axis logarithmic if ``values`` spread more than ``WIDE`` times; return whether they do."""
    known = [value for value in values if math.isfinite(value)]
    if not known or min(known) <= 0 or max(known) <= WIDE * min(known):
        return False
    axes.set_yscale("log")
    axes.set_ylim(min(known) / 1.2, max(known) * 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=2 * MAX_TICKS))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    return True


def text_on(colour: tuple[float, float, float]) -> str:
    """Return black or white, whichever is more readable on an RGB ``colour``; the contrast is never below 4.5."""
    return "#010101" if luminance(colour) > 0.18 else "#ffffff"


def luminance(colour: tuple[float, ...]) -> float:
    """Return the relative luminance of an sRGB colour (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def svg(plot: Plot) -> str:
    """Return the figure as an SVG file; equal figures give equal bytes."""
    file = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with style():
        plot.figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    text = shown(file.getvalue())
    # matplotlib makes some ids from memory addresses; and the ids of all figures of a page must differ
    ids = {name: f"{plot.name}-{i}" for i, name in enumerate(re.findall(r'\sid="([^"]*)"', text))}
    return re.sub(r'(\sid="|#)([^"#()]+)(?=["\)])', lambda found: found[1] + ids.get(found[2], found[2]), text)


def inline_svg(plot: Plot) -> str:
    """Return an SVG element for an HTML page: with the colours and font of the page, and no external reference."""
    text = svg(plot)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # these ids would occur once per figure of a page
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    label = html.escape(shown(f"{plot.title}: {plot.text}"))
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', lambda m: f'<svg viewBox="{m[1]}" role="img" aria-label="{label}">', text
    )
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def png(plot: Plot) -> bytes:
    """Return the figure as a PNG file, on white."""
    file = BytesIO()
    with style():
        plot.figure.savefig(file, format="png", dpi=PNG_DPI, metadata={"Software": None}, facecolor="white")
    return file.getvalue()


def save(plots: list[Plot], folder: Path) -> None:
    """Write each plot as ``plots/<name>.png`` and ``.svg`` below ``folder``."""
    (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    for plot in plots:
        write_bytes(folder / PLOTS_FOLDER / f"{plot.name}.png", png(plot))
        write_text(folder / PLOTS_FOLDER / f"{plot.name}.svg", svg(plot))
