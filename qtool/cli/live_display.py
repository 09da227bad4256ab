"""Progress on a terminal: ``rich.progress``, with columns of our own for counts, times and memory.

rich's own estimate of the time to go needs two finished items and stands still between them. A block of a large model
takes minutes, so the estimate shown here is ``Task.remaining``, which is also the one in logs.

The display writes escape sequences past the guard of standard error, so every text that it shows is made fit here. What
others print to standard error meanwhile appears above the running tasks, line by line.

rich's own refreshing thread may write between the moment at which a print measures the rows on the screen and the one
at which it writes, so that rows of finished tasks stay. Here one lock surrounds each write, and the thread is our own.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from threading import Event, RLock, Thread
from types import TracebackType
from typing import Self

from rich import progress as rich_progress
from rich.console import Console, RenderableType
from rich.table import Column
from rich.text import Text

from qtool.cli.streams import Guarded, unescaped
from qtool.system import interrupts
from qtool.system.peaks import peaks_in_words
from qtool.system.printable import one_line, shown
from qtool.system.progress import Sink, Task
from qtool.system.units import duration

REFRESH_SECONDS = 0.2


class _Column(rich_progress.ProgressColumn):
    """A column that shows a text made from our ``Task``."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self._text = text

    def render(self, task: rich_progress.Task) -> Text:
        return Text(self._text(task.fields["ours"]))


class _Display(rich_progress.Progress):
    """The running tasks, and below them the peak memory."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.tasks:
            yield Text(f"  {peaks_in_words()}", style="dim")


class Live(Sink):
    """Show the running tasks with bars, and print a line for each task that is over."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(file=unescaped(sys.stderr))
        self._display = _Display(
            rich_progress.SpinnerColumn("dots" if console.encoding.startswith("utf") else "line", style="default"),
            _Column(lambda task: "  " * task.depth + one_line(task.title)),
            rich_progress.BarColumn(24),
            _Column(lambda task: "" if task.total is None else f"{task.done}/{task.total}"),
            _Column(lambda task: duration(task.elapsed())),
            _Column(lambda task: "" if (left := task.remaining()) is None else f"{duration(left)} to go"),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._redirected = ExitStack()
        self._lock = RLock()
        self._ended = Event()
        self._refreshing = Thread(target=self._refresh, daemon=True)
        self._rows: dict[int, rich_progress.TaskID] = {}  # rich's task for the id() of each of ours that runs

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with interrupts.deferred(), self._lock:
            yield

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            with self._lock:
                self._display.refresh()

    def begin(self, task: Task) -> None:
        with self._writing():
            self._rows[id(task)] = self._display.add_task("", total=task.total, ours=task)

    def advance(self, task: Task) -> None:
        with self._writing():
            self._display.update(self._rows[id(task)], completed=task.done)

    def end(self, task: Task) -> None:
        console = self._display.console
        with self._writing():
            self._display.remove_task(self._rows.pop(id(task)))
            if not task.minor:
                console.print(_done(task, console.width))

    def note(self, message: str) -> None:
        with self._writing():
            self._display.console.print(Text(f"note: {shown(message)}", style="yellow"))

    def say(self, message: str) -> None:
        with self._writing():
            self._display.console.print(Text(shown(message)))

    def __enter__(self) -> Self:
        with self._writing():
            self._display.start()
            errors = sys.stderr if isinstance(sys.stderr, Guarded) else Guarded(sys.stderr)
            self._redirected.enter_context(redirect_stderr(errors))
            self._redirected.enter_context(errors.lines_to(self._print))
            self._refreshing.start()
        return self

    def _print(self, line: str) -> None:
        with self._writing():
            self._display.console.print(Text(shown(line)))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with interrupts.deferred():
            self._ended.set()
            self._refreshing.join()
            self._redirected.close()
            self._display.stop()


def _done(task: Task, width: int) -> Text:
    """Return the line for a task that is over; its title is cut to the ``width`` of the terminal."""
    mark, style = ("stopped", "red") if task.failed else ("done", "green")
    head = Text("  " * task.depth + mark, style=style)
    count = "" if task.total is None else f"{task.done}/{task.total}  "
    tail = Text(f"  {count}{duration(task.seconds)}", style="dim")
    title = Text(f"  {one_line(task.title)}")
    title.truncate(max(width - head.cell_len - tail.cell_len, 12), overflow="ellipsis")
    return Text.assemble(head, title, tail)
