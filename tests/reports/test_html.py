"""The HTML page of a report: complete, accessible, deterministic, and without external resources."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.full_report import full, linears, row
from helpers.html import HOSTILE, Tree
from helpers.records import per_block, per_step
from matplotlib import colormaps, colors
from matplotlib.backends.backend_agg import FigureCanvasAgg

from qtool.reports import drawing, figures, html, samples
from qtool.reports.records import (
    Continuation,
    Metric,
    Series,
    task_result,
)
from qtool.reports.report import Report
from qtool.reports.text import number

LOADS = ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background", "formaction")


def alone() -> Report:
    return Report(model="m", results=(row("wikitext2", "perplexity", 35.0, higher_is_better=False),))


def broken() -> Report:
    """Return a report with NaN or infinity in every field that can hold one."""
    bad = (math.nan, math.inf)
    return full().model_copy(
        update={
            "results": tuple(
                task_result(f"t{i}", "perplexity", Metric(value=a, stderr=b, n=1), Metric(value=b, stderr=a, n=1))
                for i, (a, b) in enumerate(itertools.product((*bad, 1.0), repeat=2))
            ),
            "linears": tuple(
                linear.model_copy(update={"weight_error": bad[i % 2]}) for i, linear in enumerate(linears())
            ),
            "series": (per_block(math.nan, math.inf, 0.1), per_step("e2e_loss", [math.nan, math.inf])),
        }
    )


REPORTS = {
    "full": full(),
    "hostile": full(HOSTILE),
    "float model alone": alone(),
    "not evaluated": full().model_copy(update={"results": (), "expected": ()}),
    "nothing": Report(model="m"),
    "broken": broken(),
    "trained": Report(
        model="m",
        seconds={"eval": 0.0},
        series=(
            per_step("loss", [3.0, 2.0, 1.0, 0.5]),
            Series(name="loss", per="validation", at=(0, 3, 4), values=(3.0, 1.0, 0.4)),
        ),
    ),
}


pages: dict[str, str] = {}


@pytest.fixture(params=REPORTS)
def report(request: pytest.FixtureRequest) -> Report:
    return REPORTS[request.param]


@pytest.fixture
def made(report: Report) -> str:
    """The page of ``report``."""
    name = next(name for name, each in REPORTS.items() if each is report)
    if name not in pages:
        pages[name] = html.page(report, figures.draw(report))
    return pages[name]


def test_it_is_well_formed_and_loads_nothing(made: str) -> None:
    tree = Tree(made)
    tags = {tag for tag, _ in tree.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attrs in tree.tags:
        for name in LOADS:
            assert (attrs.get(name) or "#").startswith("#"), (tag, attrs)
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        for value in attrs.values():
            assert not re.search(r"url\((?!#)", value or ""), (tag, value)
        assert "http" not in (attrs.get("style") or "")
    assert not re.search(r"@import|url\(|http", tree.style)
    assert made.isascii() or '<meta charset="utf-8">' in made


def test_ids_are_given_once_and_references_are_to_them(made: str) -> None:
    tree = Tree(made)
    ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", made)) | {
        (attrs["href"] or "")[1:] for _, attrs in tree.tags if "href" in attrs
    }
    used |= {attrs["aria-labelledby"] or "" for _, attrs in tree.tags if "aria-labelledby" in attrs}
    assert used <= set(ids)


def test_names_from_outside_are_text() -> None:
    tree = Tree(html.page(REPORTS["hostile"], figures.draw(REPORTS["hostile"])))
    assert "script" not in {tag for tag, _ in tree.tags}
    assert tree.text.count(" ".join(HOSTILE.split())) >= 8
    assert "49" not in tree.text.replace(HOSTILE, "")


def test_every_metric_is_there_with_its_error(report: Report, made: str) -> None:
    text = Tree(made).text
    for each in report.results:
        assert each.metric in text
        for value, error in ((each.value, each.stderr), (each.float_value, each.float_stderr)):
            if value is not None:
                assert number(value, error) in text
    for warning in (*report.warnings(), *report.notes(), report.headline()):
        assert " ".join(warning.split()) in text.replace(html.NBSP, " ")
    for published in report.expected:
        assert number(published.measured, published.stderr) in text


def test_texts_of_both_models_are_beside_each_other(report: Report, made: str) -> None:
    tree = Tree(made)
    for each in report.continuations:
        for text in filter(None, (each.prompt, each.text, each.float_text)):
            assert " ".join(text.split()) in tree.text
        assert samples.same(each) in tree.text
    grids = [attrs for tag, attrs in tree.tags if attrs.get("class") == "texts"]
    assert len(grids) == len(report.continuations)


@pytest.mark.parametrize(
    ("num_same", "said"),
    [
        (0, "The first token is another than the float model's"),
        (1, "The first token is that of the float model"),
        (2, "The first 2 of 3 tokens are those of the float model"),
        (3, "All 3 tokens are those of the float model"),
    ],
)
def test_the_number_of_common_tokens_is_a_sentence(num_same: int, said: str) -> None:
    assert samples.same(Continuation(prompt="p", text="t", num_tokens=3, float_text="f", num_same=num_same)) == said


def test_numbers_keep_their_units_and_lines_may_end_before_an_error() -> None:
    assert html.unbroken("up by +0.7 % ± 0.1 %, 1.86 ± 0.03 nats") == (
        "up by +0.7\xa0% ±\xa00.1\xa0%, 1.86 ±\xa00.03\xa0nats"
    )


def test_the_memory_beside_the_time_to_quantize_is_without_evaluation() -> None:
    made = Report(model="m", seconds={"quantize": 1.0}, peak_bytes={"quantize": 733 * 10**6, "eval": 1_500 * 10**6})
    text = Tree(html.page(made, [])).text
    assert "time to quantize 1.0 s peak memory 733 MB" in " ".join(text.split())
    assert made.model_copy(update={"peak_bytes": {"eval": 5}}).quantize_peak() == 5


def test_text_of_a_model_alone_is_one_column() -> None:
    continuation = Continuation(prompt="The river", text=" runs", num_tokens=1)
    tree = Tree(html.page(alone().model_copy(update={"continuations": (continuation,)}), []))
    assert "this model runs" in tree.text
    assert "What it writes" in tree.text
    assert "those of the float model" not in tree.text


def test_figures_have_words_and_tables_have_headers(made: str) -> None:
    tree = Tree(made)
    drawn = [attrs for tag, attrs in tree.tags if tag == "svg"]
    assert len(drawn) == sum(tag == "figcaption" for tag, _ in tree.tags)
    assert all(attrs["role"] == "img" and len(attrs["aria-label"] or "") > 20 for attrs in drawn)
    tables = sum(tag == "table" for tag, _ in tree.tags)
    assert tables == sum(tag == "caption" for tag, _ in tree.tags) == sum(tag == "thead" for tag, _ in tree.tags)
    headers = [attrs.get("scope") for tag, attrs in tree.tags if tag == "th"]
    assert set(headers) <= {"col", "row"}
    rows = sum(tag == "tr" for tag, _ in tree.tags)
    assert headers.count("row") == rows - tables
    assert next(tag for tag, _ in tree.tags if tag in ("h1", "h2", "h3")) == "h1"


def test_figures_are_there_only_for_what_was_measured() -> None:
    drawn = {name: [plot.name for plot in figures.draw(report)] for name, report in REPORTS.items()}
    everything = ["changes", "size", "bits", "weight-errors", "block-errors", "loss", "phases"]
    assert drawn["full"] == drawn["hostile"] == everything
    assert drawn["float model alone"] == []
    assert drawn["nothing"] == []
    assert drawn["trained"] == ["loss", "phases"]
    assert "changes" not in drawn["not evaluated"]


def contrast(a: str, b: str) -> float:
    bright, dark = sorted((drawing.luminance(colors.to_rgb(colour)) for colour in (a, b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_every_colour_of_text_is_readable_in_both_themes() -> None:
    style = Tree(html.page(alone(), [])).style
    light, dark = style.split("@media (prefers-color-scheme: dark)", 1)
    on = {"notice-ink": ["notice"]}
    text = set(re.findall(r"[^-]color: var\(--([\w-]+)\)", style))
    assert {"ink", "muted", "accent", "good", "notice-ink"} <= text
    for theme in (light, dark.split("}", 1)[0]):
        values = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        assert set(values) == set(drawing.COLOURS)
        for name in text | set(drawing.FIGURE_COLOURS) - {"panel", "line"}:
            for behind in on.get(name, ["page", "panel"]):
                assert contrast(values[name], values[behind]) >= 4.5, (name, behind, values)


def test_text_on_cells_is_readable() -> None:
    errors = (colors.to_hex(colormaps["cividis"](i)) for i in range(256))
    cells = [*figures.BIT_COLOURS.values(), figures.FLOAT_COLOUR, *errors]
    for cell in cells:
        assert contrast(drawing.text_on(colors.to_rgb(cell)), cell) >= 4.5


def test_figures_take_their_colours_from_the_page(made: str) -> None:
    body = made[made.index("<body") :]
    assert not [colour for colour in drawing.LIGHT.values() if colour in body]
    used = set(re.findall(r"var\(--([\w-]+)\)", made))
    assert used <= set(drawing.COLOURS)


def test_the_same_report_makes_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        html.write(folder, full(), files=True)
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*.*"))
    assert names == sorted(
        ["report.html", *(f"plots/{p.name}.{end}" for p in figures.draw(full()) for end in ("png", "svg"))]
    )
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert (first / "plots/bits.png").read_bytes().startswith(b"\x89PNG")
    assert "<dc:date>" not in (first / "plots/bits.svg").read_text()


def test_no_files_but_the_page_unless_asked(tmp_path: Path) -> None:
    html.write(tmp_path, full())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("blocks", [1, 8, 10, 80, 126])
def test_nothing_of_a_figure_is_cut_and_no_label_covers_another(blocks: int) -> None:
    report = full("a" * 60).model_copy(
        update={
            "linears": tuple(
                each.model_copy(update={"name": each.name.replace("mlp", "m" * 90)}) for each in linears(blocks=blocks)
            ),
            "series": (per_block(*(0.001 * (i + 1) for i in range(blocks))),),
        }
    )
    for plot in figures.draw(report):
        plot.figure.draw_without_rendering()
        canvas = plot.figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]  # matplotlib leaves it untyped
        whole = plot.figure.bbox
        boxes = []
        for axes in plot.figure.axes:
            texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
            for side, (axis, ends) in enumerate(((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))):
                low, high = sorted(ends)
                texts += [tick for tick in axis.get_ticklabels() if low <= tick.get_position()[side] <= high]
            for label in texts:
                if label.get_text() and label.get_visible():
                    boxes.append((label.get_text(), label.get_window_extent(renderer)))
        for text, box in boxes:
            assert box.x0 >= whole.x0 - 1, (plot.name, text)
            assert box.x1 <= whole.x1 + 1, (plot.name, text)
            assert box.y0 >= whole.y0 - 1, (plot.name, text)
            assert box.y1 <= whole.y1 + 1, (plot.name, text)
        for (text, box), (other, beside) in itertools.combinations(boxes, 2):
            assert not box.padded(-1).overlaps(beside.padded(-1)), (plot.name, text, other)


def test_a_long_curve_shows_the_mean_of_every_step() -> None:
    losses = tuple(float(i % 7) for i in range(1003))
    (plot,) = figures.draw(Report(model="m", series=(per_step("loss", losses),)))
    (line,) = plot.figure.axes[0].lines
    steps, means = (np.asarray(numbers, dtype=float) for numbers in line.get_data())
    width = math.ceil(len(losses) / figures.MAX_POINTS)
    assert len(means) == math.ceil(len(losses) / width) <= figures.MAX_POINTS
    sizes = [width] * (len(means) - 1) + [len(losses) - width * (len(means) - 1)]
    assert sum(m * s for m, s in zip(means, sizes, strict=True)) == pytest.approx(sum(losses))
    assert steps[0] == (1 + width) / 2
    assert f"mean of each {width} steps" in plot.figure.axes[0].get_legend_handles_labels()[1][0]
