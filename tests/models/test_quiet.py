"""A command hides the progress bars of transformers and of the hub, and leaves a user's setting as it was."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from qtool.allocation import plan as bit_plan
from qtool.evaluation import bench, tasks
from qtool.models.quiet import without_progress_bars
from qtool.pipelines import evaluate, plan, quantize
from qtool.sweeps import runner
from qtool.system.errors import InputError


def shown() -> tuple[bool, bool]:
    """True for transformers, and for the hub, if its progress bars are shown."""
    return logging.is_progress_bar_enabled(), not are_progress_bars_disabled()


def show(bars: bool, bars_of_the_hub: bool) -> None:
    set_bars: Callable[[], None] = logging.enable_progress_bar if bars else logging.disable_progress_bar
    set_bars()
    (enable_progress_bars if bars_of_the_hub else disable_progress_bars)()


@pytest.fixture(autouse=True)
def setting_as_it_was() -> Iterator[None]:
    before = shown()
    show(True, True)
    yield
    show(*before)


@pytest.mark.parametrize("before", [(True, True), (True, False), (False, True), (False, False)])
def test_progress_bars_are_hidden_inside_and_as_before_afterwards(before: tuple[bool, bool]) -> None:
    show(*before)
    with without_progress_bars():
        assert shown() == (False, False)
        with without_progress_bars():
            assert shown() == (False, False)
        assert shown() == (False, False)
    assert shown() == before


@pytest.mark.parametrize("before", [(True, True), (False, False)])
def test_an_error_and_an_interruption_leave_the_setting_as_it_was(before: tuple[bool, bool]) -> None:
    show(*before)
    for error in (InputError("refused"), KeyboardInterrupt()):
        with pytest.raises(type(error)), without_progress_bars():
            raise error
        assert shown() == before


def test_a_decorated_function_hides_them_in_every_call() -> None:
    seen = without_progress_bars()(shown)
    for _ in range(2):
        assert seen() == (False, False)
        assert shown() == (True, True)


FIRST_CALLS = {
    "quantize": (quantize, "check_early", lambda: quantize.quantize(Mock(**{"model.free": False, "target": None}))),
    "plan": (bit_plan, "check", lambda: plan.plan(Mock())),
    "evaluate": (tasks, "check_tasks", lambda: evaluate.evaluate(Mock(), Mock())),
    "bench": (bench, "NativeCheckpoint", lambda: bench.bench(".", "cpu", Mock(dtype="auto"))),
    "sweep": (runner, "_alone", lambda: runner.sweep(Mock(output=Path()))),
}


@pytest.mark.parametrize("name", FIRST_CALLS)
def test_a_command_of_the_library_leaves_a_users_progress_bars(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, first, call = FIRST_CALLS[name]
    seen: list[tuple[bool, bool]] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        seen.append(shown())
        raise InputError("refused")

    monkeypatch.setattr(owner, first, refuse)
    run: Callable[[], object] = call
    with pytest.raises(InputError, match="refused"):
        run()
    assert seen == [(False, False)]
    assert shown() == (True, True)
