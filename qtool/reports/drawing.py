"""How figures are made: one style, colours by name, and the same bytes for the same numbers.

A figure is drawn in the light colours of ``COLOURS``. Inside a page those become CSS variables, so that it follows the
reader's theme; in a file of its own it keeps them, on white.
"""

import html
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 4.6  # inches of 72 units: on a phone, text has the size it is drawn in
PNG_DPI = 200
PLOTS_FOLDER = "plots"
MAX_TICKS = 6  # at most: a number that followed from the layout would change it
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
STYLE: dict[Any, Any] = {  # its keys are a type of their own in matplotlib
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout everywhere
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
    "text.parse_math": False,  # names are names, dollar signs and all
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"],
    "legend.frameon": False,
    "svg.fonttype": "none",
}


class Plot(NamedTuple):
    """A figure, and what it shows in words, for who cannot see it."""

    name: str  # of its files
    title: str
    figure: Figure
    text: str
    caption: str = ""  # what who sees it has to know, too


@contextmanager
def style() -> Iterator[None]:
    """The style of every figure, while it is made and while it is written."""
    with matplotlib.rc_context(STYLE):
        yield


def blank(height: float, rows: int = 1, ratios: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    """A figure ``height`` inches high with ``rows`` axes, as high as ``ratios`` say; nothing of it is cut."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)  # measures text
    axes = figure.subplots(rows, 1, squeeze=False, height_ratios=ratios)
    for each in axes[:, 0]:
        each.locator_params(nbins=MAX_TICKS)
    return figure, list(axes[:, 0])


def freeze_layout(figure: Figure) -> None:
    """Lay ``figure`` out once and for all, on a grid: the last digits of matplotlib's solver vary from run to run."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)  # what drawing does first; it need not be drawn for that
    for axes in figure.axes:
        left, bottom, width, height = (round(float(each), 4) for each in axes.get_position(original=True).bounds)
        axes.set_position((left, bottom, width, height))
    figure.set_layout_engine("none")


def shortened(text: str, length: int) -> str:
    """``text`` where it fits, else its end behind an ellipsis: ends of names tell more than beginnings."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def whole_numbers(axes: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def text_on(colour: tuple[float, float, float]) -> str:
    """Black or white, whichever is read better on an RGB ``colour``: their contrast is never below 4.5."""
    return "#010101" if luminance(colour) > 0.18 else "#ffffff"


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance of sRGB (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def svg(plot: Plot) -> str:
    """A whole SVG file; the same bytes whenever the figure is the same."""
    file = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with style():
        plot.figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    text = file.getvalue()
    # matplotlib makes some ids of addresses in memory; and those of a page's plots must differ
    ids = {name: f"{plot.name}-{i}" for i, name in enumerate(re.findall(r'\sid="([^"]*)"', text))}
    return re.sub(r'(\sid="|#)([^"#()]+)(?=["\)])', lambda found: found[1] + ids.get(found[2], found[2]), text)


def inline_svg(plot: Plot) -> str:
    """The SVG element for a page: its colours are the page's, its font too, and it refers to nothing outside."""
    text = svg(plot)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # would be there once for each plot of a page
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    label = html.escape(f"{plot.title}: {plot.text}")
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', lambda m: f'<svg viewBox="{m[1]}" role="img" aria-label="{label}">', text
    )
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def png(plot: Plot) -> bytes:
    """The figure on white."""
    file = BytesIO()
    with style():
        plot.figure.savefig(file, format="png", dpi=PNG_DPI, metadata={"Software": None}, facecolor="white")
    return file.getvalue()


def save(plots: list[Plot], folder: Path) -> None:
    """Each plot as ``plots/<name>.png`` and ``.svg`` under ``folder``."""
    (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    for plot in plots:
        (folder / PLOTS_FOLDER / f"{plot.name}.png").write_bytes(png(plot))
        (folder / PLOTS_FOLDER / f"{plot.name}.svg").write_text(svg(plot), encoding="utf-8")
