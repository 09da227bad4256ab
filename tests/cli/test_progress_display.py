"""The display of progress goes to standard error, is short in logs, and reports how each stage ended."""

import io
import re
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qtool.cli import live_display, progress_display
from qtool.system import progress


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Recorder(progress_display.Lines):
    """A sink that keeps each line with the time at which it was written."""

    def __init__(self, clock: Clock, every: float = 10.0) -> None:
        super().__init__(every)
        self.clock = clock
        self.lines: list[tuple[float, str]] = []

    def _write(self, text: str) -> None:
        self.lines.append((self.clock(), text))

    @property
    def texts(self) -> list[str]:
        """Return the lines without peak memory, which differs between machines."""
        return [text.partition(", peak")[0] for _, text in self.lines]


def show_time(patch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Let progress and its display read the time from ``clock``."""
    for module in (progress, progress_display):
        patch.setattr(module, "time", SimpleNamespace(monotonic=clock))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    show_time(monkeypatch, clock)
    return clock


def busy(clock: Clock, seconds: list[float]) -> None:
    for each in progress.track(seconds, "blocks", len(seconds)):
        clock.now += each


def test_lines_say_start_end_and_how_long(clock: Clock) -> None:
    sink = Recorder(clock)
    with progress.use(sink):
        with progress.stage("loading"):
            clock.now += 2.5
        progress.note("damping raised")
        busy(clock, [15.0, 15.0, 15.0])
    assert sink.texts == [
        "loading ...",
        "loading: done in 2.5 s",
        "note: damping raised",
        "blocks: 0/3",
        "blocks: 1/3, 15.0 s, 30.0 s to go",
        "blocks: 2/3, 30.0 s, 15.0 s to go",
        "blocks: 3/3 done in 45.0 s",
    ]


@given(seconds=st.lists(st.floats(0, 30), min_size=1, max_size=40), every=st.floats(1, 20))
def test_a_log_stays_short_and_has_its_first_and_last_line(seconds: list[float], every: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        show_time(patch, clock)
        sink = Recorder(clock, every)
        with progress.use(sink):
            busy(clock, seconds)
    assert sink.texts[0] == f"blocks: 0/{len(seconds)}"
    assert sink.texts[-1].startswith(f"blocks: {len(seconds)}/{len(seconds)} done in")
    between = [time for time, _ in sink.lines[:-1]]
    assert all(later - earlier >= every for earlier, later in pairwise(between))


def test_steps_inside_an_item_write_no_lines(clock: Clock) -> None:
    sink = Recorder(clock)
    with progress.use(sink):
        for _ in progress.track(range(3), "all", 3):
            with progress.stage("solving"):
                busy(clock, [20.0] * 2)
    assert sink.texts == [
        "all: 0/3",
        "all: 1/3, 40.0 s, 1:20 to go",
        "all: 2/3, 1:20, 40.0 s to go",
        "all: 3/3 done in 2:00",
    ]


def test_what_is_inside_a_stage_is_indented(clock: Clock) -> None:
    sink = Recorder(clock)
    with progress.use(sink), progress.stage("evaluating"):
        busy(clock, [1.0])
    assert sink.texts == ["evaluating ...", "  blocks: 0/1", "  blocks: 1/1 done in 1.0 s", "evaluating: done in 1.0 s"]


def test_a_name_in_a_title_cannot_make_lines_of_its_own(clock: Clock) -> None:
    sink = Recorder(clock)
    with progress.use(sink), progress.stage("loading a\nnote: all is well\x1b[2J"):
        pass
    assert sink.texts == [
        r"loading a\nnote: all is well\x1b[2J ...",
        r"loading a\nnote: all is well\x1b[2J: done in 0.0 s",
    ]


def test_a_failure_says_where_it_stopped_and_leaves_nothing_open(clock: Clock) -> None:
    sink = Recorder(clock)
    with progress.use(sink):
        with pytest.raises(KeyError), progress.stage("exporting"):
            raise KeyError
        for i in progress.track(range(4), "blocks", 4):
            if i == 2:
                break
    assert sink.texts[-1] == "blocks: 2/4 stopped after 0.0 s"
    assert sink.texts[1] == "exporting: stopped after 0.0 s"
    assert progress._current is None


def test_lines_go_to_standard_error_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(
        progress_display.for_terminal(quiet=False), progress_display.Lines
    )  # standard error is not a terminal under pytest
    with progress.use(progress_display.for_terminal(quiet=False)):
        progress.note("hello")
    assert tuple(capsys.readouterr()) == ("", "note: hello\n")
    with progress.use(progress_display.for_terminal(quiet=True)), progress.stage("loading"):
        progress.say("a block is finished")
        progress.note("hello")
    assert tuple(capsys.readouterr()) == ("", "note: hello\n")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress_display.for_terminal(quiet=False), live_display.Live)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_display.for_terminal(quiet=False), progress_display.Lines)


def test_the_live_display_shows_bar_count_time_to_go_and_memory(clock: Clock) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    sink = live_display.Live(console)
    with progress.use(sink), progress.stage("quantizing"):
        for i in progress.track(range(3), "blocks", 3):
            clock.now += 61
            if i == 1:
                console.print(sink._display.get_renderable())
            with progress.stage("solving"):
                pass
    text = screen.getvalue()
    assert "blocks" in text
    # the first item took 61 s, and the second has lasted 61 s so far
    assert re.search(r"1/3 +2:02 +1:01 to go", text)
    assert "peak " in text
    assert "done  blocks  3/3  3:03" in text
    assert "done  quantizing  3:03" in text
    assert "done  solving" not in text
