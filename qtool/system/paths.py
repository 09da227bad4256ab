"""Paths as people write them, in recipes, on the command line and in Python: one rule for all.

``~`` and ``~user`` at the beginning are home folders, and ``$NAME`` and ``${NAME}`` are environment variables; ``$$``
is a dollar sign. An unknown user or a variable that is not set is an error, not a folder of that name.
"""

import os
import re
from pathlib import Path

from qtool.system.errors import InputError

VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{([^}]*)\})")
LONGEST_NAME = 240  # most bytes of the name of an output folder; file systems take 255, and NAME.partial is one of them


def text_fault(text: str) -> str:
    """Return what makes ``text`` unfit for any name, path or file: a NUL or half a character; ``""`` if it is fit."""
    if "\0" in text:
        return "the text holds a NUL character, which no name or path can hold"
    if any("\ud800" <= char <= "\udfff" for char in text):
        return "the text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    return ""


def expanded(text: str | Path) -> Path:
    """Return the path that ``text`` means.

    Raises:
        ValueError: it is empty, no path of this system, or names an unknown user or a variable that is not set.
    """
    written = str(text)
    if not written:
        raise ValueError("an empty text is no path")
    if wrong := text_fault(written):
        raise ValueError(wrong)
    full = VARIABLE.sub(_value, written)
    if full.startswith("~"):
        home = os.path.expanduser(full)
        if home.startswith("~"):
            raise ValueError(f"this machine has no user {full[1:].partition('/')[0]}; for a name with ~ write ./~name")
        full = home
    try:
        os.stat(full)
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be an output, or a name that is no path
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long, no permission
        raise ValueError(f"cannot be used as a path: {getattr(error, 'strerror', None) or error}") from None
    return Path(full)


def _value(found: re.Match[str]) -> str:
    if found[1]:
        return "$"
    name = found[2] or found[3]
    value = os.environ.get(name) if name else None
    if value is None:
        raise ValueError(f"the environment variable {name or found[0]} is not set; for a dollar sign write $$")
    if wrong := text_fault(value):
        raise ValueError(wrong)
    return value


def expand(text: str | Path, key: str) -> Path:
    """Return the path that ``text`` means; ``key`` is the recipe key or argument that holds it.

    Raises:
        InputError: as ``expanded``; the message names the key.
    """
    try:
        return expanded(text)
    except ValueError as error:
        raise InputError(f"{key}: {str(text)!r}: {error}") from None


def path_text(path: Path) -> str:
    """Return the text that means ``path``, for a file or command that expands it again."""
    text = str(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text
