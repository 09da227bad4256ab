"""A terminal of a given size: what is on it, scrolled lines too, after a program or a text was shown on it."""

import os
import select
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import qtool

pyte = pytest.importorskip("pyte")


class Terminal:
    """An emulated terminal."""

    def __init__(self, columns: int, rows: int) -> None:
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
        self._stream = pyte.ByteStream(self._screen)
        self.columns, self.rows = columns, rows

    def feed(self, data: bytes) -> None:
        self._stream.feed(data)

    def lines(self) -> list[str]:
        """Return all lines from the first one on, without empty ones at the end."""
        above = ["".join(row[i].data for i in range(self.columns)) for row in self._screen.history.top]
        lines = [line.rstrip() for line in [*above, *self._screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines


class Program:
    """``qtool`` with a terminal of its own, which is its controlling terminal."""

    def __init__(self, terminal: Terminal, args: Sequence[str], folder: Path) -> None:
        import fcntl
        import pty
        import termios

        self.terminal = terminal
        size = struct.pack("HHHH", terminal.rows, terminal.columns, 0, 0)
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, size)
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(each, signal.SIG_DFL)
            os.chdir(folder)
            root = str(Path(qtool.__file__).parents[1])
            environment = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": root, "QTOOL_DATA_DIR": ""}
            os.execve(sys.executable, [sys.executable, "-m", "qtool", *args], environment)

    def show(self, until: Callable[[], bool] = lambda: False) -> None:
        """Show what the program writes until it ends, or until a condition holds."""
        while not until():
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self._fd, 65536)
                except OSError:  # how Linux says that the program has ended
                    return
                if not data:
                    return
                self.terminal.feed(data)

    def write(self, text: str) -> None:
        """Type ``text``; control characters are keys, such as Ctrl-C."""
        os.write(self._fd, text.encode())

    def hang_up(self) -> None:
        """Close the terminal."""
        os.close(self._fd)

    def wait(self) -> int:
        """Wait for the end of the program, and return its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
