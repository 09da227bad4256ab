"""What a comparison says of its runs: the best at each size, differences with their errors, settings, links."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from helpers.html import Tree
from helpers.records import locked
from hypothesis import given
from hypothesis import strategies as st

from qtool.reports import pareto
from qtool.reports.compared_paths import compare
from qtool.reports.comparison import Comparison, comparison
from qtool.reports.measures import difference_error
from qtool.reports.pareto import Plane, Point
from qtool.reports.records import Metric, TaskResult, task_result
from qtool.reports.report import Report

MB = 1_000_000


def row(value: float, stderr: float | None = 0.1, **fields: Any) -> TaskResult:
    known = {"higher_is_better": False, "delta_stderr": stderr} | fields
    reference = Metric(value=10.0, stderr=1.0, n=100)
    return task_result("wikitext2", "perplexity", Metric(value=value, stderr=1.0, n=100), reference, **known)


def run(value: float, size: int, *, quantized: str | None = "q", **fields: Any) -> Report:
    known = {"model": "m", "method": "gptq", "label": "w4", "quantized": quantized, "quantized_bytes": size}
    return Report.model_validate(known | {"float_bytes": 40 * MB, "results": (row(value),)} | fields)


def cells(found: Comparison, column: str) -> dict[str, str]:
    table = found.table()
    index = list(table.columns).index(column)
    return {line[0]: line[index] for line in table.rows}


# the sentence


def test_the_best_run_of_each_size_is_named_with_its_change_and_its_equals() -> None:
    made = {
        "big": run(10.1, 30 * MB),
        "big2": run(10.2, 30 * MB + 64),  # headers differ by some bytes
        "mid": run(12.0, 20 * MB),
        "odd": run(13.0, 25 * MB),
        "low": run(20.0, 10 * MB),
    }
    assert comparison(made).sentence() == (
        "Best at each size by wikitext2 perplexity, with the change against the float model: big at 30.0 MB (+1.0 % ± "
        "1.0 %; as good within 2 standard errors: big2), mid at 20.0 MB (+20.0 % ± 1.0 %), low at 10.0 MB (+100.0 % ± "
        "1.0 %). Larger than a run that is as good or better: odd."
    )


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(10, 30)), min_size=2, max_size=7))
def test_a_run_is_named_as_best_exactly_if_no_other_run_of_its_size_or_smaller_is_better(
    runs: list[tuple[int, int]],
) -> None:
    made = {f"r{i}x": run(float(value), size * MB) for i, (size, value) in enumerate(runs)}
    listed = comparison(made).sentence().partition(" Larger than")[0].partition("model: ")[2]
    named = {name for name in made if f"{name} at " in listed}
    values = {name: made[name].results[0].value or 0 for name in named}
    for name, (size, value) in zip(made, runs, strict=True):
        others = [(s, v) for s, v in runs if s <= size]
        if name in named:
            assert value == min(v for _, v in others)
        else:
            assert any((v, s) <= (value, size) for s, v in others)
    assert len(set(values.values())) == len(values), "each larger winner is better than the smaller ones"


def test_without_two_runs_to_compare_there_is_no_sentence() -> None:
    assert comparison({"a": run(10.0, MB)}).sentence() == ""
    assert comparison({"a": run(10.0, MB), "b": run(math.nan, MB)}).sentence() == ""
    assert comparison({"a": run(10.0, MB), "b": run(9.0, 0)}).sentence() == ""


# errors of differences


@given(st.lists(st.tuples(st.floats(2, 2.2), st.floats(-0.1, 0.1)), min_size=3, max_size=20))
def test_runs_on_the_same_windows_are_compared_window_by_window(windows: list[tuple[float, float]]) -> None:
    first = [loss for loss, _ in windows]
    second = [loss + change for loss, change in windows]
    values = [math.exp(statistics.fmean(losses)) for losses in (first, second)]
    a, b = (
        row(value, 5.0, windows=losses, text="0" * 64) for value, losses in zip(values, (first, second), strict=True)
    )
    # the jackknife is another estimate of the same error
    left_out = [
        math.exp(statistics.fmean(first[:i] + first[i + 1 :]))
        - math.exp(statistics.fmean(second[:i] + second[i + 1 :]))
        for i in range(len(windows))
    ]
    jackknife = math.sqrt((len(windows) - 1) * statistics.pvariance(left_out))
    found = difference_error(a, b)
    assert found is not None
    assert found == pytest.approx(jackknife, rel=0.2, abs=1e-3)
    assert difference_error(a, a) == 0
    assert difference_error(a, b.model_copy(update={"text": "1" * 64})) == pytest.approx(math.hypot(5, 5))


def test_changes_and_differences_to_the_best_stand_beside_the_numbers() -> None:
    found = comparison({"a": run(11.0, 20 * MB), "b": run(12.0, 10 * MB)})
    assert cells(found, "wikitext2 perplexity") == {
        "float": "10.00 ± 1.00",
        "1 a": "11.00 ± 1.00 *",
        "2 b": "12.00 ± 1.00",
    }
    assert cells(found, "change") == {"float": "", "1 a": "+1.00 ± 0.10", "2 b": "+2.00 ± 0.10"}
    assert cells(found, "to the best") == {"float": "", "1 a": "", "2 b": "+1.00 ± 0.14"}
    (measure,) = found.as_dict()["measures"]
    assert [each["to_the_best"] for each in measure["values"]] == [None, 1.0]


# the float model


def test_the_float_model_is_the_first_row_unless_a_run_is_of_it() -> None:
    made = {"a": run(11.0, 20 * MB), "b": run(12.0, 10 * MB, float_bytes=None)}
    assert cells(comparison(made), "size") == {"float": "40.0 MB", "1 a": "20.0 MB", "2 b": "10.0 MB"}
    alone = run(10.0, 0, quantized=None, method=None, label=None)
    own = alone.model_copy(update={"results": (task_result("wikitext2", "perplexity", Metric(value=10.0, n=9), None),)})
    assert list(cells(comparison(made | {"own": own}), "run")) == ["1 own", "2 a", "3 b"]
    two = comparison(made | {"c": run(9.0, MB, model="other")})
    assert list(cells(two, "run"))[:2] == ["float m", "float other"]


# settings


def test_the_grid_of_each_run_is_named_and_the_text_of_those_that_read_none_is_not() -> None:
    def made(samples: int, calibration: dict[str, Any] | None, **quant: Any) -> Report:
        data = {"source": "enwiki", "num_samples": samples, "seq_len": 32}
        lock = locked(method={"name": "m"}, quant={"num_bits": 4} | quant, data=data)
        return run(11.0, MB, lock=lock, calibration=calibration)

    def found(*runs: Report) -> dict[str, list[str]]:
        return dict(comparison(dict(zip("ab", runs, strict=True))).as_dict()["settings"])

    text = {"source": "enwiki", "num_samples": 8, "seq_len": 32}
    assert found(made(8, None), made(16, None, grid="q4_k")) == {"quant.grid": ["affine", "q4_k"]}
    assert found(made(8, text), made(16, text)) == {"data.num_samples": ["8", "16"]}
    assert found(made(8, text), made(16, None)) == {}


def test_settings_in_which_runs_differ_are_listed() -> None:
    def lock(method: dict[str, Any], bits: int, **more: Any) -> Any:
        return locked(method=method, quant={"num_bits": bits, "group_size": 64} | more)

    made = {
        "a": run(11.0, 20 * MB, lock=lock({"name": "gptq", "damp": 0.1}, 4)),
        "b": run(12.0, 10 * MB, lock=lock({"name": "gptq", "damp": 0.2}, 3, overrides={"*.q": {"num_bits": 8}})),
        "c": run(13.0, 5 * MB, lock=lock({"name": "rtn", "range": "minmax"}, 3), dtype="float32"),
        "d": run(14.0, 4 * MB),
    }
    found = comparison(made).as_dict()["settings"]
    assert found == {
        "method.name": ["gptq", "gptq", "rtn", ""],
        "method.damp": ["0.1", "0.2", "", ""],
        "quant.num_bits": ["4", "3", "3", ""],
        "quant.overrides": ["", '{"*.q": {"num_bits": 8}}', "", ""],
    }
    text = comparison(made).markdown()
    assert "## Settings that differ\n\n| setting | 1 a | 2 b | 3 c | 4 d |" in text
    assert "| method.damp | 0.1 | 0.2 |  |  |" in text
    assert "Settings that differ" not in comparison({"a": made["a"], "e": made["a"]}).markdown()
    made["b"] = run(12.0, 10 * MB, lock=lock({"name": "gptq", "damp": 0.1}, 4, budget={"average_bits": 3.0}))
    found = comparison({"a": made["a"], "b": made["b"], "d": made["d"]}).as_dict()["settings"]
    assert found == {"quant.num_bits": ["4", "", ""], "quant.budget.average_bits": ["", "3.0", ""]}


# links


def test_the_page_leads_to_the_pages_of_the_runs(tmp_path: Path) -> None:
    for name, value in (("a b", 11.0), ("c", 12.0)):
        (tmp_path / "out" / name).mkdir(parents=True)
        run(value, 10 * MB).write(tmp_path / "out" / name)
    (tmp_path / "out" / "a b" / "report.html").write_text("<p>")
    found = compare([tmp_path / "out" / "a b", tmp_path / "out" / "c"])
    found.write(tmp_path / "elsewhere" / "compared")

    def links(page: str) -> list[str | None]:
        return [dict(attributes)["href"] for tag, attributes in Tree(page).tags if tag == "a"]

    page = (tmp_path / "elsewhere" / "compared" / "compare.html").read_text()
    assert links(page) == ["../../out/a%20b/report.html"]
    assert links(found.html()) == [(tmp_path / "out" / "a b" / "report.html").as_uri()]
    reports = [
        each["report"] for each in json.loads((tmp_path / "elsewhere/compared/compare.json").read_text())["runs"]
    ]
    assert reports == [str(tmp_path / "out" / name / "report.json") for name in ("a b", "c")]


# axes


@pytest.mark.parametrize(("worst", "scale"), [(49.0, "linear"), (51.0, "log")])
def test_an_axis_is_logarithmic_where_the_spread_asks_for_it(worst: float, scale: str) -> None:
    points = [Point(1, "a", 4.0, 10.0, 0.1), Point(2, "b", 2.0, worst, 60.0)]
    plot = pareto.plot("p", points, Plane("bits per weight", "perplexity", False, 10.0))
    (axes,) = plot.figure.axes
    assert axes.get_yscale() == scale
    assert axes.get_xscale() == "linear"
    assert ("The axis of quality is logarithmic." in plot.caption) == (scale == "log")


def test_large_files_are_in_gigabytes() -> None:
    found = comparison({"a": run(11.0, 16_060 * MB), "b": run(12.0, 5_730 * MB)})
    assert cells(found, "size")["1 a"] == "16.1 GB"
    assert [plot.title for plot in found.plots()] == ["wikitext2 perplexity against GB on disk"]
