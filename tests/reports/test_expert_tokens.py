"""The calibration tokens that experts saw: in words, and as a figure."""

import numpy as np

from qtool.blocks.job import block_series, expert_figures
from qtool.reports.expert_figure import draw_coverage
from qtool.reports.expert_tokens import coverage
from qtool.reports.report import Report

COUNTS = ([0, 40, 200, 17], [16, 15, 3000, 20])


def test_counts_of_all_blocks_are_one_series() -> None:
    series = block_series([expert_figures(counts) | {"block_error": 0.1} for counts in COUNTS])
    assert {(each.name, each.per) for each in series} == {("expert_tokens", "expert"), ("block_error", "block")}
    found = coverage(series)
    assert found is not None
    assert (found.blocks, found.tokens) == ([0, 1], [[float(count) for count in counts] for counts in COUNTS])
    assert str(found) == "0 to 3,000 tokens, median 18; 2 of 8 saw fewer than 16"


def test_blocks_without_experts_are_left_out() -> None:
    series = block_series([{"block_error": 0.1}, expert_figures([20, 16])])
    found = coverage(series)
    assert found is not None
    assert found.blocks == [1]
    assert str(found) == "16 to 20 tokens, median 18; all of 2 saw at least 16"
    assert coverage(block_series([{"block_error": 0.1}])) is None


def test_the_figure_shows_most_median_and_fewest_of_each_block() -> None:
    report = Report(model="a model")
    assert draw_coverage(report) is None
    plot = draw_coverage(report.model_copy(update={"series": block_series(map(expert_figures, COUNTS))}))
    assert plot is not None
    lines = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in plot.figure.axes[0].get_lines()}
    assert (lines["most"], lines["median"], lines["fewest"]) == ([200, 3000], [28.5, 18], [0, 15])
