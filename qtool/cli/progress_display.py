"""Progress on standard error: plain lines for logs, and the choice between these and the live display."""

import os
import sys
import time

from qtool.system import distributed
from qtool.system.peaks import peaks_in_words
from qtool.system.printable import one_line
from qtool.system.progress import Sink, Task
from qtool.system.units import duration


class Notes(Sink):
    """Print notes alone."""

    def note(self, message: str) -> None:
        print(f"note: {message}", file=sys.stderr, flush=True)


class Lines(Notes):
    """Print plain lines for logs: start and end of each task, and between them at most one line per ``every`` seconds.

    Steps inside an item print nothing.
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
        self._say(task, f"{task.title}: {task.done}/{task.total}, {times}, {peaks_in_words()}")

    def end(self, task: Task) -> None:
        if task.minor:
            return
        how = "stopped after" if task.failed else "done in"
        count = "" if task.total is None else f"{task.done}/{task.total} "
        self._say(task, f"{task.title}: {count}{how} {duration(task.seconds)}, {peaks_in_words()}")

    def note(self, message: str) -> None:
        self._write(f"note: {message}")

    def say(self, message: str) -> None:
        self._write(message)

    def _say(self, task: Task, text: str) -> None:
        self._last = time.monotonic()
        self._write("  " * task.depth + one_line(text))

    def _write(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def for_terminal(quiet: bool) -> Sink:
    """Return the sink for this process: live on a terminal, lines elsewhere, notes alone if ``quiet``."""
    if not distributed.is_first():  # the first process prints the same
        return Sink()
    if quiet:
        return Notes()
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return Lines()
    from qtool.cli.live_display import Live  # it loads rich.progress

    return Live()
