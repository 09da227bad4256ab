"""Errors that a person can act on; anything else keeps its traceback, because it is our bug."""

from collections.abc import Iterable


class QtoolError(Exception):
    """The base of errors that are printed as a message: what was found, what was expected, what to do."""

    exit_code = 1


class InputError(QtoolError):
    """What the user gave cannot be used: a recipe, a model, data, a path, a format. Nothing was lost."""

    exit_code = 2


class RunError(QtoolError):
    """A run that began could not be finished: disk full, a matrix that cannot be factorised, a check that failed."""


def listing(head: str, faults: Iterable[str]) -> str:
    """Join a heading and faults into one message, each fault on an indented line of its own."""
    return "\n  ".join([head, *faults])


def first_line(error: Exception) -> str:
    """The first line of a message that may have many."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
