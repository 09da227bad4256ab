"""Lines made to fit a terminal."""

import re
from textwrap import wrap

LEAST = 30  # columns that text beside a name needs; with fewer, it goes on below the name
_COMMAND = re.compile(r"\b(?:pip install|qtool) [^;]*$")
_GLUE = "\0"  # stands for a blank at which no line is broken


def folded(text: str, width: int) -> str:
    """Return ``text`` with each line of more than ``width`` characters broken at blanks.

    A line goes on below its last column, which two blanks or more begin, or is indented by two more blanks. Words stay
    whole, and so does a command at the end of a line if it fits into one, so that both can be copied.
    """
    return "\n".join(part for line in text.split("\n") for part in _folded(line, width))


def _folded(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    columns = [gap.end() for gap in re.finditer(r"(?<=\S)  +", line)]
    indent = max(
        (column for column in columns if column <= width - LEAST), default=len(line) - len(line.lstrip(" ")) + 2
    )
    if (command := _COMMAND.search(line)) and len(command[0]) <= width - indent:
        line = line[: command.start()] + command[0].replace(" ", _GLUE)
    lines = wrap(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return [each.replace(_GLUE, " ") for each in lines]
