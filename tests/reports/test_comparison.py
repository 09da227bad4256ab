"""``qtool compare``: only results that are comparable are compared, in whatever order runs are given."""

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.html import HOSTILE, Tree
from helpers.records import locked
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from rich.console import Console

from qtool.cli import main
from qtool.reports import pareto
from qtool.reports.compared_paths import compare
from qtool.reports.comparison import Comparison, comparison
from qtool.reports.measures import difference_error
from qtool.reports.pareto import Plane, Point, front
from qtool.reports.records import Metric, TaskResult, task_result
from qtool.reports.report import PLOTS_FOLDER, Report
from qtool.reports.verdict import SIGMAS
from qtool.system.errors import InputError


def row(value: float, stderr: float | None = 0.1, metric: str = "perplexity", **fields: Any) -> TaskResult:
    more = {"higher_is_better": metric == "acc", "limit": 8} | fields
    task = str(more.pop("task", "wikitext2"))
    reference = Metric(value=10.0, stderr=0.1, n=100)
    return task_result(task, metric, Metric(value=value, stderr=stderr, n=100), reference, **more)


def report(value: float, bits: float = 4.25, *, rows: tuple[TaskResult, ...] = (), **fields: Any) -> Report:
    given_ = {
        "model": "m",
        "quantized": "q",
        "method": "gptq",
        "label": f"w{bits:.0f}g64",
        "bits_per_weight": bits,
        "quantized_bytes": round(bits * 1e6),
        "dtype": "float32",
        "device": "cpu",
        "results": (row(value), *rows),
    }
    return Report.model_validate(given_ | fields)


def cells(found: Comparison, start: str) -> list[str]:
    """Return the first column whose name starts with the given text; runs with more bits come first."""
    table = found.table()
    (index,) = [i for i, name in enumerate(table.columns) if name.startswith(start)]
    return [line[index] for line in table.rows if line[0][0].isdigit()]  # without the float model


def save(folder: Path, made: Report) -> Path:
    folder.mkdir(parents=True)
    made.write(folder)
    return folder


# the Pareto front

points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(points, st.booleans())
def test_the_front_is_what_no_other_beats(places: list[tuple[int, int]], higher: bool) -> None:
    runs = [Point(i, f"run {i}", x, y, None) for i, (x, y) in enumerate(places)]

    def beats(a: Point, b: Point) -> bool:
        as_good = a.y >= b.y if higher else a.y <= b.y
        return as_good and a.x <= b.x and (a.x, a.y) != (b.x, b.y)

    expected = {run.number for run in runs if not any(beats(other, run) for other in runs)}
    found = front(runs, higher)
    assert {run.number for run in found} == expected
    assert [run.x for run in found] == sorted(run.x for run in found)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.floats(2, 8), st.floats(30, 60)), min_size=2, max_size=14), st.integers(1, 50))
def test_labels_cover_neither_each_other_nor_a_point_nor_the_edge(
    places: list[tuple[float, float]], length: int
) -> None:
    runs = [Point(i + 1, "n" * length, x, y, None) for i, (x, y) in enumerate(places)]
    plot = pareto.plot("pareto-bits", runs, Plane("bits per weight", "wikitext2 perplexity", False, 29.5))
    (axes,) = plot.figure.axes
    plot.figure.draw_without_rendering()
    canvas = plot.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]  # matplotlib leaves it untyped
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]  # without the lines to their points
    inside = axes.get_window_extent(renderer)
    for box in boxes:
        assert inside.x0 - 1 <= box.x0
        assert box.x1 <= inside.x1 + 1
    for a, b in itertools.combinations(boxes, 2):
        assert not a.padded(pareto.LABEL_GAP - 1, -1).overlaps(b.padded(0, -1))
    for run, box in itertools.product(runs, boxes):
        x, y = axes.transData.transform((run.x, run.y))
        assert not box.padded(-1).contains(x, y)
    names = [text.get_text() for text in axes.texts if text.get_text() != "float"]
    labelled = {int(name.split()[0]) for name in names}
    assert len(labelled) == len(names)
    if len(labelled) < len(runs):
        assert f"No room for the names of {len(runs) - len(labelled)} points" in plot.caption


def test_a_few_points_have_their_names() -> None:
    runs = [Point(1, "gptq", 4.25, 35.0, 0.2), Point(2, "rtn", 4.25, 37.0, 0.2), Point(3, "awq", 3.25, 40.0, 0.3)]
    axes: Axes = pareto.plot("p", runs, Plane("bits per weight", "perplexity", False, 34.0)).figure.axes[0]
    assert {text.get_text() for text in axes.texts} == {"float", "1 gptq", "2 rtn", "3 awq"}


# which results are comparable


def test_the_order_in_which_runs_are_given_changes_nothing(tmp_path: Path) -> None:
    made = {"a": report(10.5), "b": report(11.0, 3.25), "c": report(10.4, rows=(row(0.6, metric="acc", task="boolq"),))}
    folders = [save(tmp_path / name, each) for name, each in made.items()]
    texts = {compare(order).markdown() for order in itertools.permutations(folders)}
    assert len(texts) == 1
    assert len({compare(order).html() for order in list(itertools.permutations(folders))[:2]}) == 1


@given(st.lists(st.tuples(st.floats(5, 50), st.floats(0.01, 3)), min_size=2, max_size=6))
def test_the_best_and_what_cannot_be_told_from_it_are_marked(values: list[tuple[float, float]]) -> None:
    reports = {f"r{i}": report(0, rows=()) for i in range(len(values))}
    reports = {
        name: each.model_copy(update={"results": (row(*value),)})
        for (name, each), value in zip(reports.items(), values, strict=True)
    }
    found = comparison(reports)
    (measure,) = found.measures
    marks = found.marks(measure)
    lowest, error = min(values)
    for index, run in enumerate(found.runs):
        value, own = values[int(run.name[1:])]
        if value == lowest:
            assert marks[index] == " *"
    best = next(i for i, mark in marks.items() if mark == " *")
    error = values[int(found.runs[best].name[1:])][1]
    for index, run in enumerate(found.runs):
        value, own = values[int(run.name[1:])]
        if value != lowest:
            assert (marks.get(index) == " ~") == (value - lowest <= SIGMAS * math.hypot(own, error))


def test_the_metrics_of_a_divergence_are_beside_each_other() -> None:
    more = (row(0.6, 0.001, "acc", task="boolq"), row(0.1, None, "median", task="kl"), row(0.2, 0.1, "kl", task="kl"))
    columns = comparison({"a": report(10, rows=more), "b": report(11, rows=more)}).table().columns
    assert [name for name in columns if name in ("kl", "kl median", "boolq acc")] == ["kl", "kl median", "boolq acc"]


def test_higher_is_better_where_it_is() -> None:
    rows = {name: report(10, rows=(row(acc, 0.001, "acc", task="boolq"),)) for name, acc in (("a", 0.6), ("b", 0.7))}
    assert [cell[-1] for cell in cells(comparison(rows), "boolq acc")] == ["0", "*"]


def test_the_error_of_a_difference_is_that_of_the_paired_changes_where_these_are_known() -> None:
    paired, plain = row(10, 3.0, delta_stderr=0.3), row(10, 4.0)
    assert difference_error(paired, row(9, 3.0, delta_stderr=0.4)) == pytest.approx(0.5)
    assert difference_error(row(9, 3.0), plain) == difference_error(paired, plain) == pytest.approx(5.0)
    assert difference_error(row(9, None), plain) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"limit": None}, "no limit"),
        ({"n": 90}, "n 90"),
        ({"num_fewshot": 5}, "5-shot"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_what_was_measured_otherwise_has_a_column_of_its_own(change: dict[str, Any], said: str) -> None:
    other = report(9.0, 3.25)
    if "dtype" in change:
        other = other.model_copy(update=change)
    else:
        other = other.model_copy(update={"results": (other.results[0].model_copy(update=change),)})
    found = comparison({"a": report(10.0), "b": report(11.0, 2.25), "c": other})
    names = found.table().columns
    assert [name for name in names if said in name]
    columns = [cells(found, name) for name in names if name.startswith("wikitext2")]
    assert ["10.00 ± 0.10 *", "", "11.00 ± 0.10"] in columns, "the better number of another measure is not the best"
    assert ["", "9.00 ± 0.10", ""] in columns
    (note,) = [note for note in found.notes if "not comparable" in note]
    assert said in note
    assert "(a, b)" in note


def test_perplexity_of_another_float_model_is_not_compared_but_accuracy_is() -> None:
    accuracy = (row(0.6, 0.001, "acc", task="boolq"),)
    found = comparison({"a": report(10.0, rows=accuracy), "b": report(9.0, 3.25, rows=accuracy, model="other")})
    assert not any(
        cell.endswith("*") for name in ("m", "other") for cell in cells(found, f"wikitext2 perplexity, of {name}")
    )
    assert [cell[-1] for cell in cells(found, "boolq acc")] == ["*", "*"]
    assert "Different float models: m (a); other (b)." in found.notes[0]


def test_a_model_is_known_by_its_files_and_not_by_how_it_was_called() -> None:
    lock = locked(model_files={"model.safetensors": "abc"})
    same = {
        "a": report(10.0, model="m", lock=lock),
        "b": report(9.0, model="./m", lock=lock),
        "c": report(8, model="m"),
    }
    assert not any("Different float models" in note for note in comparison(same).notes)
    changed = locked(model_files={"model.safetensors": "abd"})
    assert "Different" in comparison(same | {"d": report(10.0, lock=changed)}).notes[0]


def test_numbers_that_are_none_are_shown_and_never_best() -> None:
    found = comparison({"a": report(math.nan), "b": report(math.inf, 3.25), "c": report(12, 2.25)})
    assert cells(found, "wikitext2") == ["nan", "inf", "12.00 ± 0.10"]
    assert "nan" in found.markdown()
    json.dumps(found.as_dict(), allow_nan=False)
    assert found.html()


def test_runs_without_results_are_compared_by_size() -> None:
    bare = {name: report(1, bits).model_copy(update={"results": ()}) for name, bits in (("a", 4.25), ("b", 3.25))}
    found = comparison(bare)
    assert cells(found, "bits/weight") == ["4.250", "3.250"]
    assert found.plots() == []
    Tree(found.html())


def test_the_page_is_whole_and_names_are_text() -> None:
    rows = (row(0.6, metric="acc", task=HOSTILE, note=HOSTILE),)
    found = comparison({HOSTILE: report(10, rows=rows, model=HOSTILE), "b": report(11.0, 3.25, rows=rows)})
    tree = Tree(found.html())
    assert not {tag for tag, _ in tree.tags} & {"script", "img", "link", "iframe"}
    assert tree.text.count(" ".join(HOSTILE.split())) >= 3
    assert sum(tag == "svg" for tag, _ in tree.tags) == 2
    for line in found.table().rows:
        for cell in line:
            assert " ".join(cell.split()) in tree.text


@pytest.mark.parametrize("count", [0, 12])
def test_a_phone_lists_the_runs_once(count: int) -> None:
    rows = tuple(row(0.6, metric="acc", task=f"task{index}") for index in range(count))
    runs = {name: report(10).model_copy(update={"results": rows}) for name in "ab"}
    tree = Tree(comparison(runs).html())
    shown = [attrs["class"] for tag, attrs in tree.tags if tag == "div" and attrs.get("role") == "region"]
    assert len([each for each in shown if each != "scroll on-wide"]) == 1
    assert (len(shown) > 1) == (count > 0)
    narrow = tree.style[tree.style.index("@media (max-width: 52rem)") :]
    assert ".on-wide { display: none; }" in narrow
    assert ".on-narrow { display: block; }" in narrow


# the command


def test_every_path_that_is_wrong_is_named(tmp_path: Path) -> None:
    good = save(tmp_path / "good", report(10))
    damaged = save(tmp_path / "damaged", report(10))
    (damaged / "report.json").write_text("{")
    with pytest.raises(InputError) as caught:
        compare([good, good, damaged, tmp_path / "none"])
    message = str(caught.value)
    for part in ("damaged/report.json is not a report", "none cannot be read: No such file", "2 times"):
        assert part in message
    with pytest.raises(InputError, match="no run was given"):
        compare([])


def test_what_lies_beside_runs_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 10.0), ("b", 11.0)):
        save(tmp_path / name, report(value))
    compare([tmp_path / "a", tmp_path / "b"]).write(tmp_path / "compared")
    (tmp_path / "a.yaml").write_text("model: {}\n")
    (tmp_path / "sweep.json").write_text("{}\n")
    (tmp_path / "c.partial" / "state").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    paths = sorted(tmp_path.iterdir())
    found = compare(paths)
    assert [run.name for run in found.runs] == ["a", "b"]
    expected = {
        "a.yaml": "is not a report of a qtool run",
        "c.partial": "it is an unfinished run",
        "compared": "it is a comparison",
        "empty": "a run (qtool ptq, qat, ...) or qtool eval -o writes one",
        "sweep.json": "is not a report of a qtool run",
    }
    assert len(found.left_out) == len(expected)
    for line, (name, what) in zip(found.left_out, expected.items(), strict=True):
        assert f"/{name}" in line
        assert what in line
        assert f"left out: {line}" in found.markdown()
        assert line in Tree(found.html()).text
    assert main.main(["compare", *map(str, paths), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["left_out"] == list(found.left_out)
    assert [line for line in printed.err.splitlines() if line.startswith("note: ")] == [
        f"note: {line}" for line in found.left_out
    ]
    with pytest.raises(InputError, match="it is a comparison"):
        compare([tmp_path / "compared", tmp_path / "empty"])


def test_names_are_as_long_as_tells_them_apart(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, report(10)) for name in ("x/w4", "y/w4", "y/w3")]
    assert sorted(run.name for run in compare(paths).runs) == ["x/w4", "y/w3", "y/w4"]
    assert sorted(run.name for run in compare([paths[0] / "report.json", paths[2]]).runs) == ["w3", "w4"]


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(save(tmp_path / name, report(value, bits))) for name, value, bits in (("a", 10, 4.25), ("b", 11, 3.25))]
    out = tmp_path / "out"
    assert main.main(["compare", *runs, "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| float |  |  |  | 10.00 ± 0.10 |  |  |  |  |" in printed
    assert "| 1 a | gptq w4g64 | 4.250 | 4.25 MB | 10.00 ± 0.10 \\* | +0.00 ± 0.14 |  |" in printed
    assert "| 2 b | gptq w3g64 | 3.250 | 3.25 MB | 11.00 ± 0.10 | +1.00 ± 0.14 | +1.00 ± 0.14 |" in printed
    assert printed.rstrip().endswith(str(out))
    names = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    figures = {f"plots/pareto-{kind}.{end}" for kind in ("bits", "size") for end in ("png", "svg")}
    assert names == {"compare.html", "compare.md", "compare.json"} | figures
    assert (out / "compare.md").read_text() in printed
    assert main.main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] is None
    assert found | {"path": None} == {"path": None} | json.loads((out / "compare.json").read_text())
    assert [value["best"] for value in found["measures"][0]["values"]] == [True, False]
    assert main.main(["compare", str(tmp_path)]) == 2
    assert "has no report.json" in capsys.readouterr().err


def test_a_terminal_shows_the_same_numbers(tmp_path: Path) -> None:
    found = comparison({"[red]a[/red]": report(10), "b": report(11, 3.25)})
    with (tmp_path / "shown").open("w", encoding="utf-8") as file:
        found.render(Console(file=file, width=200, force_terminal=False))
    shown = (tmp_path / "shown").read_text(encoding="utf-8")
    for text in itertools.chain(found.table().columns, *found.table().rows):
        assert text in shown
    assert PLOTS_FOLDER not in shown


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", None),
        ("float_bytes", -1),
        ("quantized_bytes", 10**400),
        ("bits_per_weight", "3"),
        ("seconds", {"quantize": -1}),
        ("peak_bytes", {"load": -5}),
        ("results", {}),
        ("results", [{"task": "x", "metric": "y", "value": [1]}]),
        ("results", [{"task": "x", "metric": "y", "value": 1.0, "n": -1}]),
        ("linears", [{"name": "x", "shape": [1]}]),
        ("series", [{"name": "x", "per": "block", "at": [0], "values": []}]),
        ("lock", {"model": {}}),
    ],
)
def test_a_report_with_a_wrong_value_is_refused_with_file_and_key(tmp_path: Path, key: str, value: object) -> None:
    folder = save(tmp_path / "run", report(10))
    (folder / "report.json").write_text(json.dumps(json.loads((folder / "report.json").read_text()) | {key: value}))
    with pytest.raises(InputError, match=rf"report\.json is not a report of a qtool run: it is damaged.* \({key}"):
        compare([folder])


def test_a_fifo_is_no_report(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.json")
    with pytest.raises(InputError, match=r"report\.json is not a report of a qtool run: it is a FIFO"):
        compare([tmp_path])


def test_numbers_that_are_not_finite_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", report(float("inf")))
    assert next(iter(compare([folder]).runs[0].results.values())).value == float("inf")
