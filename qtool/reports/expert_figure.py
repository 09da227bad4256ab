"""The number of calibration tokens that each expert of a mixture saw: as a figure, and in words."""

from itertools import groupby
from statistics import median
from typing import NamedTuple

from qtool.reports.drawing import LIGHT, Plot, blank, whole_numbers
from qtool.reports.records import EXPERT_TOKENS
from qtool.reports.report import Report

FEW = 16  # fewest tokens with which an expert counts as seen


class Coverage(NamedTuple):
    """The tokens that the experts of each block saw, in the order of blocks."""

    blocks: list[int]
    tokens: list[list[float]]

    def __str__(self) -> str:
        every = [count for each in self.tokens for count in each]
        few = sum(count < FEW for count in every)
        least, middle, most = (f"{value:,.0f}" for value in (min(every), median(every), max(every)))
        seen = f"{few} of {len(every)} saw fewer than {FEW}" if few else f"all of {len(every)} saw at least {FEW}"
        return f"{least} to {most} tokens, median {middle}; {seen}"


def coverage(report: Report) -> Coverage | None:
    """Return the tokens that experts saw; ``None`` if the model has no experts, or no text was read."""
    series = next((each for each in report.series if (each.name, each.per) == (EXPERT_TOKENS, "expert")), None)
    if series is None or not series.values:
        return None
    pairs = groupby(zip(series.at, series.values, strict=True), key=lambda pair: pair[0])
    found = [(block, [count for _, count in group]) for block, group in pairs]
    return Coverage([block for block, _ in found], [counts for _, counts in found])


def draw_coverage(report: Report) -> Plot | None:
    """Draw the most, the median and the fewest tokens that an expert saw, block by block."""
    found = coverage(report)
    if found is None:
        return None
    figure, (axes,) = blank(2.3)
    lines = {
        "most": ([max(counts) for counts in found.tokens], "muted"),
        "median": ([median(counts) for counts in found.tokens], "accent"),
        "fewest": ([min(counts) for counts in found.tokens], "second"),
    }
    for label, (values, colour) in lines.items():
        axes.plot(found.blocks, values, "o-", color=LIGHT[colour], markersize=4, linewidth=1.2, label=label)
    axes.axhline(FEW, color=LIGHT["bad"], linewidth=0.8, linestyle="--")
    axes.text(1, FEW, f" {FEW}", color=LIGHT["bad"], transform=axes.get_yaxis_transform(), va="center")
    axes.set_yscale("symlog", linthresh=10)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block")
    axes.set_ylabel("calibration tokens")
    axes.grid(axis="y")
    axes.legend(ncols=3, loc="upper left", bbox_to_anchor=(0, 1.2))
    whole_numbers(axes)
    caption = f"A token counts for each expert that its router chose. Experts below {FEW} tokens are hardly calibrated."
    return Plot("expert-tokens", "Calibration tokens that an expert saw", figure, f"{found}.", caption)
