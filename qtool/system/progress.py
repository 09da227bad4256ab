"""Report what a run does with ``stage``, ``track`` and ``note``; the sink in use shows it.

Everything goes to standard error; standard output is for results. The first sink is silent, so that the library stays
quiet, until the command line chooses another one with ``use``.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from qtool.system import interrupts

T = TypeVar("T")


@dataclass
class Task:
    """A running task: a stage, or ``total`` items of which ``done`` are finished."""

    title: str
    total: int | None = None
    parent: "Task | None" = None
    done: int = 0
    reached: float = 0.0  # seconds from the start to the end of the last finished item
    failed: bool = False
    seconds: float = 0.0
    started: float = 0.0

    @property
    def depth(self) -> int:
        """The number of tasks around this one."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def minor(self) -> bool:
        """True if this task is a step inside an item of another task; there may be hundreds of such steps."""
        return self.parent is not None and (self.parent.total is not None or self.parent.minor)

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    def remaining(self) -> float | None:
        """Return the seconds to go at the mean speed so far, or ``None`` before the first item is finished."""
        if self.total is None or not self.done:
            return None
        return max(self.reached / self.done * (self.total - self.done) - (self.elapsed() - self.reached), 0.0)


class Sink:
    """A sink shows progress; this one shows nothing."""

    def begin(self, task: Task) -> None:
        """Show that ``task`` starts."""

    def advance(self, task: Task) -> None:
        """Show that more items of ``task`` are done: ``task.done``."""

    def end(self, task: Task) -> None:
        """Show that ``task`` is over; ``task.seconds`` and ``task.failed`` are set."""

    def note(self, message: str) -> None:
        """Show a message that matters for the result."""

    def say(self, message: str) -> None:
        """Show a message on how the run goes on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Restore the terminal."""


_sink: Sink = Sink()
_current: Task | None = None


@contextmanager
def use(sink: Sink) -> Iterator[None]:
    """Show progress in ``sink`` inside the ``with`` block."""
    global _sink
    before, _sink = _sink, sink
    try:
        with sink:
            yield
    finally:
        _sink = before


@contextmanager
def _task(title: str, total: int | None) -> Iterator[Task]:
    global _current
    interrupts.check()
    task = _current = Task(title, total, parent=_current, started=time.monotonic())
    _sink.begin(task)
    try:
        yield task
    except BaseException:
        task.failed = True
        raise
    finally:
        task.seconds = task.elapsed()
        _current = task.parent
        _sink.end(task)


def track(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Yield ``items`` one by one, and show item i of ``total`` with the time to go and peak memory."""
    with counted(title, total) as reach:
        for done, item in enumerate(items, start=1):
            yield item
            reach(done)


@contextmanager
def counted(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Like ``track``, for work that another loop drives: call the function given with the number of items done."""
    with _task(title, total) as task:

        def reach(done: int) -> None:
            interrupts.check()
            if task.done < done:
                task.done, task.reached = done, task.elapsed()
                _sink.advance(task)

        yield reach


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Show ``title`` while the ``with`` block runs, and afterwards how long it took."""
    with _task(title, None):
        yield


def note(message: str) -> None:
    """Tell the user something that matters for the result, in a line of its own, which ``--quiet`` does not hide."""
    _sink.note(message)


def say(message: str) -> None:
    """Tell the user how the run goes on, in a line of its own."""
    _sink.say(message)
