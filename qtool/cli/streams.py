"""Standard output and standard error as the command line uses them: nothing that is written can fail or do harm.

A closed or full stream loses what is written to it, and nothing else: the work goes on. For standard output the first
fault is kept, because a result that was not printed must not end with exit code 0. Text is written as ``shown`` makes
it, whoever prints it.
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from qtool.system.printable import shown


class Guarded(io.TextIOBase):
    """A text stream around another one, or around ``None`` if that is closed."""

    def __init__(self, inner: TextIO | None, escaped: bool = True) -> None:
        self.inner = inner
        self.escaped = escaped
        self.fault: OSError | None = None  # the first
        self.written = False
        self._show: Callable[[str], None] | None = None  # shows each line instead of ``inner``
        self._begun = ""  # the line that has no end yet, for ``_show``

    @property
    def encoding(self) -> str:  # type: ignore[override] # an attribute there
        """The encoding of the stream around which this one is."""
        return getattr(self.inner, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write ``text``, with what the encoding lacks replaced."""
        self.written = True
        if self._show is not None:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                self._show(line)
            return len(text)
        safe = shown(text) if self.escaped else text
        try:
            safe.encode(self.encoding)
        except UnicodeEncodeError:
            safe = safe.replace("±", "+-").encode(self.encoding, "backslashreplace").decode(self.encoding)
        try:
            if self.inner is None:
                raise OSError(errno.EBADF, "it is closed")
            self.inner.write(safe)
        except OSError as error:
            self.fault = self.fault or error
        return len(text)

    @contextmanager
    def lines_to(self, show: Callable[[str], None]) -> Iterator[None]:
        """Give each line written inside the ``with`` block to ``show``, also if the writer knew this stream before."""
        self._show = show
        try:
            yield
        finally:
            self._show = None
            if self._begun:
                show(self._begun)
            self._begun = ""

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            if self.inner is not None:
                self.inner.flush()
        except OSError as error:
            self.fault = self.fault or error

    def fileno(self) -> int:
        """Return the file descriptor."""
        if self.inner is None:
            raise io.UnsupportedOperation("fileno")
        return self.inner.fileno()

    def isatty(self) -> bool:
        """Return whether this is a terminal."""
        return self.inner is not None and self.inner.isatty()

    def writable(self) -> bool:
        """Return that it can be written to."""
        return True


@contextmanager
def guarded() -> Iterator[tuple[Guarded, Guarded]]:
    """Guard ``sys.stdout`` and ``sys.stderr`` inside the ``with`` block."""
    before = sys.stdout, sys.stderr
    out, err = Guarded(sys.stdout), Guarded(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        yield out, err
    finally:
        sys.stdout, sys.stderr = before


def unescaped(stream: TextIO) -> TextIO:
    """Return the stream for escape sequences of our own: colours, and the movements of the live display."""
    if not isinstance(stream, Guarded):
        return stream
    return cast(TextIO, Guarded(stream.inner, escaped=False))


def occupy_descriptors() -> None:
    """Open the null device in place of each closed standard stream, lest a file of the run gets its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 # as long as the process
