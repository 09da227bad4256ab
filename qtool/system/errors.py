"""Errors that a user can act on. Any other exception is a bug in qtool and keeps its traceback."""

from collections.abc import Iterable


class QtoolError(Exception):
    """The base of errors that are printed as a message: what was found, what was expected, and what to do."""

    exit_code = 1


class InputError(QtoolError):
    """The user's input cannot be used: a recipe, a model, data, a path, a format. Nothing was lost."""

    exit_code = 2


class RunError(QtoolError):
    """A run failed after it began: disk full, a matrix that cannot be factorised, a check that failed."""


def counted(count: int, noun: str) -> str:
    """Return ``1 fault``, ``2 faults`` and so on."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listing(head: str, faults: Iterable[str]) -> str:
    """Join a heading and faults into one message, each fault on an indented line of its own."""
    return "\n  ".join([head, *faults])


def nearest(found: str, known: Iterable[str], words: str, count: int = 1) -> str:
    """Return ``words`` with the ``count`` nearest known names in place of ``{}``; ``""`` if none is near ``found``."""
    from difflib import get_close_matches  # only where something is wrong

    near = get_close_matches(found, list(known), n=count)
    return words.format(", ".join(near)) if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, which may have many, or the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
