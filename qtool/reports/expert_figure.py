"""The figure of the calibration tokens that the experts of a mixture saw."""

from statistics import median

from qtool.reports.drawing import LIGHT, Plot, blank, whole_numbers
from qtool.reports.expert_tokens import FEW, coverage
from qtool.reports.report import Report


def draw_coverage(report: Report) -> Plot | None:
    """Draw the most, the median and the fewest tokens that an expert saw, block by block."""
    found = coverage(report.series)
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
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(0, 2 * max(*map(max, found.tokens), FEW))
    axes.set_xlabel("block")
    axes.set_ylabel("calibration tokens")
    axes.grid(axis="y")
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1), columnspacing=1.2, handlelength=1.4)
    whole_numbers(axes)
    caption = f"A token counts for each expert that its router chose. Experts below {FEW} tokens are hardly calibrated."
    return Plot("expert-tokens", "Calibration tokens that an expert saw", figure, f"{found}.", caption)
