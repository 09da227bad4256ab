"""Progress on a terminal: ``rich.progress``, with columns of our own for counts, times and memory.

rich's own estimate of the time to go needs two finished items and stands still between them. A block of a large model
takes minutes, so the estimate shown here is ``Task.remaining``, which is also the one in logs.
"""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from rich import progress as rich_progress
from rich.console import Console, RenderableType
from rich.text import Text

from qtool.system.peaks import peaks_in_words
from qtool.system.progress import Sink, Task
from qtool.system.units import duration


class _Column(rich_progress.ProgressColumn):
    """A column that shows a text made from our ``Task``."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__()
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
        console = console or Console(stderr=True)
        self._display = _Display(
            rich_progress.SpinnerColumn("dots" if console.encoding.startswith("utf") else "line", style="default"),
            _Column(lambda task: "  " * task.depth + task.title),
            rich_progress.BarColumn(24),
            _Column(lambda task: "" if task.total is None else f"{task.done}/{task.total}"),
            _Column(lambda task: duration(task.elapsed())),
            _Column(lambda task: "" if (left := task.remaining()) is None else f"{duration(left)} to go"),
            console=console,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=False,
        )
        self._rows: dict[int, rich_progress.TaskID] = {}  # rich's task for the id() of each of ours that runs

    def begin(self, task: Task) -> None:
        self._rows[id(task)] = self._display.add_task("", total=task.total, ours=task)

    def advance(self, task: Task) -> None:
        self._display.advance(self._rows[id(task)])

    def end(self, task: Task) -> None:
        self._display.remove_task(self._rows.pop(id(task)))
        if task.minor:
            return
        mark, style = ("stopped", "red") if task.failed else ("done", "green")
        count = "" if task.total is None else f"{task.done}/{task.total}  "
        line = Text("  " * task.depth + mark, style=style)
        line.append(f"  {task.title}  ", style="default")
        line.append(f"{count}{duration(task.seconds)}", style="dim")
        self._display.console.print(line)

    def note(self, message: str) -> None:
        self._display.console.print("note: " + message, style="yellow", markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._display.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._display.stop()
