"""How a run tells a person what it does: ``stage``, ``track`` and ``note``, shown by the sink in use.

Everything goes to standard error; standard output is for results. The sink is silent until the command line chooses
another one with ``use``, so that the library stays quiet. GPU memory is shown where torch is already loaded.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

T = TypeVar("T")


def _now() -> float:
    return time.monotonic()


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
    started: float = field(default_factory=lambda: _now())

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
        return _now() - self.started

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
    task = _current = Task(title, total, parent=_current)
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


def peak_memory_bytes() -> int:
    """The most resident memory this process has held so far; 0 where the system does not tell."""
    with suppress(OSError):  # on Linux getrusage also counts the parent's memory at the time of the fork
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes() -> int:
    """The most GPU memory torch has allocated on one device; 0 without torch loaded, or without a GPU in use."""
    torch: Any = sys.modules.get("torch")  # Any: never imported from here
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_available() or not cuda.is_initialized():
        return 0
    return max(int(cuda.max_memory_allocated(i)) for i in range(cuda.device_count()))


def duration(seconds: float) -> str:
    """``4.2 s``, ``3:05`` or ``1:02:05``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def size(num_bytes: float) -> str:
    """``812 MB`` or ``3.4 GB``, in powers of ten."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 0.9995e9 else f"{num_bytes / 1e6:.0f} MB"


def memory() -> str:
    """Peak memory in words, with the GPU's where there is one in use."""
    gpu = peak_gpu_bytes()
    return f"peak {size(peak_memory_bytes())}" + (f", GPU {size(gpu)}" if gpu else "")


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
        if task.minor or task.done == task.total or _now() - self._last < self.every:
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
        self._last = _now()
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
