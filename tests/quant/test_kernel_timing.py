"""The choice of the fastest way is never slower than another possible one; timings are taken in turns, once."""

from typing import Any

import pytest
import torch
from helpers.weights import w
from hypothesis import given
from hypothesis import strategies as st

from qtool.config.quant import QuantSpec
from qtool.quant import kernel_timing
from qtool.quant.kernel_timing import EXACT, Timing, is_dense, ranked

WAYS = [EXACT, "int4", "int4 pairs", "ort", "dense float32", "dense bfloat16"]
CPU = torch.device("cpu")
timings = st.dictionaries(st.sampled_from(WAYS), st.floats(1e-6, 10.0), min_size=1).map(
    lambda each: {EXACT: 1.0} | each
)


@given(timings, st.sets(st.sampled_from(WAYS)))
def test_nothing_possible_is_faster_than_what_is_chosen(seconds: dict[str, float], possible: set[str]) -> None:
    order = ranked(seconds, possible)
    assert set(order) <= possible & seconds.keys() - {EXACT}
    first = seconds[order[0]] if order else seconds[EXACT]
    assert all(first <= seconds[name] for name in {EXACT, *possible} & seconds.keys())
    times = [seconds[name] for name in order]
    assert times == sorted(times)
    assert all(each < seconds[EXACT] for each in times)


@given(timings.filter(lambda seconds: any(map(is_dense, seconds))))
def test_where_dense_weights_are_possible_no_kernel_is_slower(seconds: dict[str, float]) -> None:
    order = ranked(seconds, seconds)
    chosen = seconds[order[0]] if order else seconds[EXACT]
    assert chosen <= min(each for name, each in seconds.items() if is_dense(name))


def test_a_slow_int4_product_is_used_only_where_there_is_no_room_for_a_dense_weight() -> None:
    """The times of a processor without instructions for bfloat16."""
    seconds = {EXACT: 80.0, "int4": 20.0, "dense float32": 9.0, "dense bfloat16": 20.5}
    assert ranked(seconds, seconds)[0] == "dense float32"
    assert ranked(seconds, {"int4"}) == ["int4"]
    assert ranked(seconds | {"ort": 3.0}, {"int4", "ort"})[0] == "ort"
    assert ranked(seconds, set()) == []


@pytest.mark.parametrize(
    ("dtype", "dense"),
    [
        (torch.float32, ["dense float32"]),
        (torch.bfloat16, ["dense float32", "dense bfloat16"]),
        (torch.float16, ["dense float32"]),
    ],
    ids=str,
)
def test_a_dense_weight_is_never_narrower_than_the_model(dtype: torch.dtype, dense: list[str]) -> None:
    names = [backend.name for backend in kernel_timing.backends_for(dtype, CPU)]
    assert [name for name in names if is_dense(name)] == dense
    assert "ort" in names
    assert not {"gemlite"} & set(names), "it runs on a GPU"
    assert "ort" not in [backend.name for backend in kernel_timing.backends_for(dtype, CPU, experts=4)]


def test_speeds_are_told_against_the_faster_dense_product() -> None:
    seconds = {EXACT: 8.0, "int4": 4.0, "ort": 0.5, "dense float32": 2.0, "dense bfloat16": 3.0}
    timing = Timing(32, 64, w(4, 32), seconds, {})
    assert timing.dense == 2.0
    assert [timing.speedup(name) for name in ("ort", "int4", EXACT)] == [4.0, 0.5, 0.25]
    assert str(timing) == "32 x 64 w4g32: ort 4.00 x, int4 0.50 x, exact 0.25 x the speed of the dense product"


@pytest.mark.parametrize(
    "spec", [w(4, 32), w(2, 32, False), QuantSpec.model_validate({"grid": "q4_k"}), w(8, -1)], ids=QuantSpec.label
)
def test_a_shape_is_timed_in_every_way_once(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[list[tuple[int, ...]]] = []

    def measure(ways: Any, device: torch.device) -> dict[str, float]:
        shapes.append([tuple(product().shape) for products in ways.values() for product in products])
        return dict.fromkeys(ways, 1.0)

    monkeypatch.setattr(kernel_timing, "_measure", measure)
    monkeypatch.setattr(kernel_timing, "TIMED_NUMBERS", 256 * 256)
    kernel_timing._timing.cache_clear()
    found = [kernel_timing.timing(spec, 1000, 256, torch.bfloat16, CPU) for _ in range(2)]
    kernel_timing._timing.cache_clear()
    assert found[0] is found[1]
    assert shapes == [[(1, 256)] * 2 * len(found[0].seconds)], "two weights for each way, of as many rows as are timed"
    ways = {backend.name for backend in kernel_timing.backends_for(torch.bfloat16, CPU)}
    assert found[0].seconds.keys() | found[0].reasons.keys() == {EXACT, *ways}
    assert not found[0].seconds.keys() & found[0].reasons.keys()
    assert {EXACT, "dense float32", "dense bfloat16"} <= found[0].seconds.keys()
    assert ("ort" in found[0].seconds) == (spec.blocks is None)


def test_ways_take_turns_and_the_shortest_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran = [0.0], []
    durations = {EXACT: iter([9.0]), "int4": iter([3.0, 1.0, 4.0, 5.0, 6.0]), "ort": iter([2.0, 2.0, 2.0, 0.5, 2.0])}

    def way(name: str) -> list[Any]:
        def timed() -> None:
            ran.append(name)
            clock[0] += next(durations[name])

        return [lambda: ran.append(f"warm {name}"), timed]

    monkeypatch.setattr("qtool.quant.kernel_timing.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(kernel_timing, "EVICTING", 1)
    found = kernel_timing._measure({name: way(name) for name in durations}, CPU)
    assert found == {EXACT: 9.0, "int4": 1.0, "ort": 0.5}
    turn = ["warm int4", "int4", "warm ort", "ort"]
    assert ran == [f"warm {EXACT}", EXACT, *turn * kernel_timing.ROUNDS]
