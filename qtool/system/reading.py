"""Reading of small files that others wrote: configs, manifests, reports, recipes.

Only regular files are opened, and only up to a size: a FIFO would be waited for, and a device such as ``/dev/zero``
never ends. JSON of any content is a value or an ``InputError``, never another exception.
"""

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qtool.system.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound="BaseModel")

LIMIT = 64 * 2**20  # largest file that is read whole, in bytes; the largest tokenizer.json known has 40 MB


def read_bytes(file: Path, limit: int = LIMIT) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes. Links are followed.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is no regular file, is larger, or cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(file, flags)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(*error.args) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InputError(f"{file} is {kind_of(mode)}; a regular file is needed")
    with os.fdopen(descriptor, "rb") as opened:
        try:
            content = opened.read(limit + 1)
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise InputError(f"{file} is larger than {limit / 2**20:.0f} MiB, more than any such file holds")
    return content


def kind_of(mode: int) -> str:
    """Return the kind of file that ``st_mode`` says, in words."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
        stat.S_IFLNK: "a link",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")


def read_text(file: Path, limit: int = LIMIT) -> str:
    """Return the UTF-8 text of a file; a byte-order mark is skipped.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: as ``read_bytes``, or the content is not UTF-8.
    """
    content = read_bytes(file, limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file} is not UTF-8: byte 0x{content[error.start]:02x} in line {line}") from None


def read_json(file: Path, limit: int = LIMIT) -> Any:
    """Return the value in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: as ``read_text``, or the content is not JSON.
    """
    text = read_text(file, limit)
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{file} is not JSON that can be used: it is nested too deeply") from None
    except ValueError as error:  # also an integer of too many digits
        raise InputError(f"{file} is not JSON: {error}") from None


def read_object(file: Path, limit: int = LIMIT) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: as ``read_json``, or the value is no object.
    """
    found = read_json(file, limit)
    if not isinstance(found, dict):
        raise InputError(f"{file} holds a {type(found).__name__}; a JSON object was expected")
    return found


def read_typed(file: Path, kind: type[M], advice: str) -> M:
    """Return the JSON object in a file as a ``kind``, a pydantic model; every value must have its type already.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: as ``read_object``, or a key is missing or wrong; the message names it, and ends in ``advice``.
    """
    from pydantic import ValidationError  # here, because it takes long to load

    try:
        return kind.model_validate_json(json.dumps(read_object(file)), strict=True)
    except ValidationError as error:
        raise InputError(f"{file} is damaged, or of another version of qtool ({fault(error)}); {advice}") from None


def fault(error: "ValidationError", before: str = "") -> str:
    """Return the first fault that pydantic found: its dotted key, below the key ``before``, and what is wrong."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in (before, *first["loc"]) if part != "")
    return f"{key}: {first['msg']}" if key else first["msg"]
