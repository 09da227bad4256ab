"""What the figures of losses, sizes and series show."""

import numpy as np
import pytest
from helpers.full_report import full, row
from helpers.records import per_block, per_step

from qtool.reports import figures
from qtool.reports.change_figure import LOSSLESS
from qtool.reports.drawing import Plot
from qtool.reports.records import Exported, Series, TaskResult
from qtool.reports.report import Report


def drawn(report: Report, name: str) -> Plot:
    return next(plot for plot in figures.draw(report) if plot.name == name)


def bars_of(plot: Plot) -> list[tuple[float, float, float]]:
    """Return the low end, the middle and the high end of each error bar."""
    found = []
    for container in plot.figure.axes[0].containers:
        point, _, bars = container
        low, high = bars[0].get_segments()[0][:, 0]
        found.append((float(low), float(point.get_xdata()[0]), float(high)))
    return found


PERPLEXITY = row("wikitext2", "perplexity", 35.7, 35.0, delta_stderr=0.07, higher_is_better=False)
ACCURACY = row("boolq", "acc", 0.588, 0.60, delta_stderr=0.003, higher_is_better=True)
DIVERGENCE = row("kl", "kl", 0.03, higher_is_better=False)


def test_losses_are_around_zero_and_what_is_worse_is_to_the_right() -> None:
    plot = drawn(Report(model="m", results=(PERPLEXITY, ACCURACY, DIVERGENCE)), "changes")
    (axes,) = plot.figure.axes
    low, high = axes.get_xlim()
    assert low < -LOSSLESS < 0 < LOSSLESS < high
    expected = [(1.6, 2.0, 2.4), (1.0, 2.0, 3.0), (-5.0, 3.0, 11.0)]  # error bars of two standard errors; of kl 0.04
    assert bars_of(plot) == [pytest.approx(each) for each in expected]
    assert low < -5 < 11 < high
    for text in ("wikitext2 perplexity +2.0 % ± 0.2 %", "boolq acc -2.0 % ± 0.5 %", "kl 0.030 ± 0.040 nats"):
        assert text in plot.text
    assert axes.get_xscale() == "linear"


@pytest.mark.parametrize(("loss", "scale"), [(0.02, "linear"), (0.049, "linear"), (0.06, "symlog"), (3.0, "symlog")])
def test_the_axis_of_losses_is_logarithmic_if_they_spread_more_than_five_times(loss: float, scale: str) -> None:
    near = row("wikitext2", "perplexity", 35.01, 35.0, higher_is_better=False)
    far = row("c4", "perplexity", 35.0 * (1 + loss), 35.0, higher_is_better=False)
    (axes,) = drawn(Report(model="m", results=(near, far)), "changes").figure.axes
    assert axes.get_xscale() == scale
    assert ("logarithmic" in axes.get_xlabel()) == (scale == "symlog")
    assert axes.get_xlim()[1] > 100 * loss


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_no_line_goes_through_the_words_and_numbers(count: int) -> None:
    results = ([PERPLEXITY, ACCURACY, DIVERGENCE] * 3)[:count]
    rows = [each.model_copy(update={"task": f"{each.task} {index}"}) for index, each in enumerate(results)]
    (axes,) = drawn(Report(model="m", results=tuple(rows)), "changes").figure.axes
    axes.figure.canvas.draw()
    paths = [np.asarray(path.vertices) for each in axes.collections for path in each.get_paths()]
    spans = [np.sort(axes.transData.transform(path)[:, 1])[[0, -1]] for path in paths]
    assert len(spans) > 3 * count
    assert not axes.xaxis.get_gridlines()[0].get_visible()
    for text in axes.texts:
        words = text.get_window_extent().shrunk(1, 0.8)  # without the room for accents
        assert not any(words.y0 < high and low < words.y1 for low, high in spans), text.get_text()


def test_rows_without_a_float_number_are_not_in_it() -> None:
    missing = TaskResult(task="c4", metric="perplexity", value=None)
    percentile = row("kl", "median", 0.01, higher_is_better=False)
    assert len(bars_of(drawn(Report(model="m", results=(PERPLEXITY, missing, percentile)), "changes"))) == 1
    assert not figures.draw(Report(model="m", results=(missing, percentile)))


def test_the_bars_of_sizes_are_divided_and_add_up() -> None:
    report = full()
    plot = drawn(report, "size")
    by_row: dict[float, float] = {}
    for patch in plot.figure.axes[0].patches:
        middle = patch.get_y() + patch.get_height() / 2  # type: ignore[attr-defined]  # patches are rectangles
        by_row[round(middle)] = by_row.get(round(middle), 0.0) + patch.get_width()  # type: ignore[attr-defined]
    assert by_row == pytest.approx({0: report.float_bytes, 1: report.quantized_bytes, 2: report.exports[0].num_bytes})
    assert "embedding and head (tied) 1.00 MB" in plot.text
    names = [text.get_text() for text in plot.figure.legends[0].get_texts()]
    assert names == ["linears", "embedding", "other tensors"]


def test_sizes_of_a_report_that_knows_no_embeddings_are_whole() -> None:
    large = Exported(format="gguf", path="p", num_bytes=10**10, weight_difference=0, logit_difference=0)
    plot = drawn(full().model_copy(update={"tables": (), "exports": (large,)}), "size")
    assert plot.text == "float 6.80 MB, quantized 2.00 MB, as gguf 10.0 GB."
    assert not plot.figure.legends


@pytest.mark.parametrize(("last", "scale"), [(0.24, "linear"), (0.26, "log")])
def test_the_axis_of_block_errors_is_logarithmic_if_they_spread_more_than_five_times(last: float, scale: str) -> None:
    errors = per_block(0.01, 0.02, 0.01 * last**2 / 0.05**2)  # squares: the roots spread last / 0.05 times
    (axes,) = drawn(Report(model="m", series=(errors,)), "block-errors").figure.axes
    assert axes.get_yscale() == scale


def test_the_axis_of_losses_of_training_is_logarithmic_if_validation_spreads_widely() -> None:
    losses = per_step("loss", [3.0, 2.0, 1.0])
    held = Series(name="loss", per="validation", at=(0, 3), values=(9.0, 1.0))
    assert drawn(Report(model="m", series=(losses,)), "loss").figure.axes[0].get_yscale() == "linear"
    assert drawn(Report(model="m", series=(losses, held)), "loss").figure.axes[0].get_yscale() == "log"
