"""How a run tells a person what it does: ``stage``, ``track`` and ``note``, shown by the sink in use.

Everything goes to standard error; standard output is for results. The sink is silent until the command line chooses
another one with ``use``, so that the library stays quiet. GPU memory is shown where torch is already loaded.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")


@dataclass
class Task:
    """One thing under way: a stage, or ``total`` items of which ``done`` are finished."""

    title: str
    total: int | None = None
    parent: "Task | None" = None
    done: int = 0
    reached: float = 0.0  # seconds at which the last of them was done
    failed: bool = False
    seconds: float = 0.0
    started: float = 0.0

    @property
    def depth(self) -> int:
        """How many tasks this one is inside of."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def minor(self) -> bool:
        """Whether this is a step of an item, of which there may be hundreds."""
        return self.parent is not None and (self.parent.total is not None or self.parent.minor)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def remaining(self) -> float | None:
        """Seconds to go when the rest is as fast as what is done; ``None`` while nothing is."""
        if self.total is None or not self.done:
            return None
        return max(self.reached / self.done * (self.total - self.done) - (self.elapsed() - self.reached), 0.0)


class Sink:
    """Where progress is shown; this one shows nothing."""

    def begin(self, task: Task) -> None:
        """``task`` starts."""

    def advance(self, task: Task) -> None:
        """One more item of ``task`` is done."""

    def end(self, task: Task) -> None:
        """``task`` is over; ``task.seconds`` and ``task.failed`` are set."""

    def note(self, message: str) -> None:
        """Something a person should know about this run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Put the terminal back as it was."""


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
    """``items`` one by one, shown as item i of ``total`` with the time to go and peak memory."""
    with counted(title, total) as reach:
        for done, item in enumerate(items, start=1):
            yield item
            reach(done)


@contextmanager
def counted(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """The same for work that another loop drives: it calls what this gives with how many items are done."""
    with _task(title, total) as task:

        def reach(done: int) -> None:
            while task.done < done:
                task.done, task.reached = task.done + 1, task.elapsed()
                _sink.advance(task)

        yield reach


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Show that the ``with`` block does what ``title`` says, and afterwards how long it took."""
    with _task(title, None):
        yield


def note(message: str) -> None:
    """Tell the person something about this run, in a line of its own."""
    _sink.note(message)
