"""Progress on standard error: plain lines for logs, a live display on a terminal."""

import os
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from qtool.system.memory import memory
from qtool.system.progress import Sink, Task
from qtool.system.units import duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text


class Lines(Sink):
    """Plain lines for logs: the start and the end of each task, and between them at most one every ``every`` seconds.

    Of the steps inside an item only the last word is said when they fail.
    """

    def __init__(self, every: float = 10.0) -> None:
        self.every = every
        self._last = 0.0

    def begin(self, task: Task) -> None:
        if not task.minor:
            self._say(task, f"{task.title} ..." if task.total is None else f"{task.title}: 0/{task.total}")

    def advance(self, task: Task) -> None:
        if task.minor or task.done == task.total or time.monotonic() - self._last < self.every:
            return
        times = f"{duration(task.elapsed())}, {duration(task.remaining() or 0)} to go"
        self._say(task, f"{task.title}: {task.done}/{task.total}, {times}, {memory()}")

    def end(self, task: Task) -> None:
        if task.minor:
            return
        how = "stopped after" if task.failed else "done in"
        count = "" if task.total is None else f"{task.done}/{task.total} "
        self._say(task, f"{task.title}: {count}{how} {duration(task.seconds)}, {memory()}")

    def note(self, message: str) -> None:
        self._write(f"note: {message}")

    def _say(self, task: Task, text: str) -> None:
        self._last = time.monotonic()
        self._write("  " * task.depth + text)

    def _write(self, text: str) -> None:
        with suppress(BrokenPipeError):
            print(text, file=sys.stderr, flush=True)


class Live(Sink):
    """A terminal: what runs now with a bar, and a line for each thing that is done."""

    def __init__(self, console: "Console | None" = None) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive
        from rich.spinner import Spinner

        self._console = console or Console(stderr=True)
        self._spinner = Spinner("dots" if self._console.encoding.startswith("utf") else "line")
        self._tasks: list[Task] = []
        self._live = RichLive(
            console=self._console,
            get_renderable=self._view,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=False,
        )

    def begin(self, task: Task) -> None:
        self._tasks.append(task)

    def end(self, task: Task) -> None:
        self._tasks.remove(task)
        if task.minor:
            return
        from rich.text import Text

        mark, style = ("stopped", "red") if task.failed else ("done", "green")
        count = "" if task.total is None else f"{task.done}/{task.total}  "
        line = Text("  " * task.depth + mark, style=style)
        line.append(f"  {task.title}  ", style="default")
        line.append(f"{count}{duration(task.seconds)}", style="dim")
        self._console.print(line)

    def note(self, message: str) -> None:
        self._console.print("note: " + message, style="yellow", markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()

    def _view(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        tasks = list(self._tasks)  # the display runs in a thread of its own
        grid = Table.grid(padding=(0, 2, 0, 0))
        frame = cast("Text", self._spinner.render(self._console.get_time()))
        for task in tasks:
            title = Text("  " * task.depth) + Text.assemble(frame if task is tasks[-1] else Text(" "), " ", task.title)
            if task.total is None:
                grid.add_row(title, "", "", duration(task.elapsed()), "")
                continue
            left = task.remaining()
            grid.add_row(
                title,
                ProgressBar(total=max(task.total, 1), completed=task.done, width=24),
                f"{task.done}/{task.total}",
                duration(task.elapsed()),
                "" if left is None else f"{duration(left)} to go",
            )
        return Group(grid, Text(f"  {memory()}", style="dim")) if tasks else grid


def for_terminal(quiet: bool) -> Sink:
    """The sink for this process: live on a terminal, lines elsewhere, silent when asked."""
    if quiet:
        return Sink()
    return Live() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else Lines()
