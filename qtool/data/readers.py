"""Text and rows of text, JSON Lines and Parquet files, read only as far as needed; errors name the place."""

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qtool.system import units
from qtool.system.errors import InputError, first_line
from qtool.system.reading import kind_of

# functions that open compressed files, by suffix
OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz")  # suffixes of files with one JSON object in each line
OF_CONVERSATIONS = ", or for a conversation 'messages', 'conversations', or 'instruction' and 'output'"
LONGEST_LINE = 1 << 28  # most bytes of a line that is read: a compressed file can hold one without end
SURROGATE = re.compile("[\ud800-\udfff]")  # halves of surrogate pairs


def check_file(path: Path, known: Sequence[str], key: str = "data.source") -> None:
    """Refuse a file of text or tokens that cannot be read, without reading it; ``known`` are the suffixes.

    ``key`` names the option or recipe key in messages.

    Raises:
        InputError: ``path`` does not exist, is a folder, is empty, or has another suffix.
    """
    if not path.exists():
        raise InputError(f"{key}: there is no file {path}")
    if not path.is_file():
        kind = kind_of(path.stat().st_mode)
        raise InputError(f"{key}: {path} is {kind}; give a file that ends in {', '.join(known)}")
    if not path.name.endswith(tuple(known)):
        raise InputError(f"{key}: {path} has a suffix that cannot be read; known are {', '.join(known)}")
    if not path.stat().st_size:
        raise InputError(f"{key}: {path} is empty")


def check_text(text: str, place: str) -> None:
    """Refuse half of a surrogate pair, which is no character; JSON can hold one as an escape such as ``\\ud800``.

    Raises:
        InputError: names the half and its position; ``place`` says where the text is.
    """
    if found := SURROGATE.search(text):
        raise InputError(
            f"{place}: character {found.start()} of the text is \\u{ord(found[0]):04x}, half of a surrogate pair; "
            "remove it, or write the whole character"
        )


def read_file(path: Path) -> Iterator[str]:
    """Return the texts of a file, in order, to be read one by one.

    Raises:
        InputError: the file cannot be read; the line, byte or row is named.
    """
    suffix = next(suffix for suffix in READERS if path.name.endswith(suffix))
    return READERS[suffix](path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line."""
    offset = 0
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    size = units.size(LONGEST_LINE)
                    raise InputError(f"{path}: line {number} is longer than {size}; break the text into lines")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                offset += len(line)
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise InputError(
            f"{path} is not UTF-8: line {number}, byte {at} of the file is 0x{error.object[error.start]:02x} "
            f"({error.reason}); convert it, for example with iconv -t UTF-8"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _read_txt(path: Path) -> Iterator[str]:
    """Yield the documents of a plain text file; two or more empty lines end a document."""
    document: list[str] = []
    empty = 0
    for _, line in _lines(path):
        document.append(line)
        empty = 0 if line.strip("\r\n") else empty + 1
        if empty == 2:
            yield "".join(document).strip("\r\n")
            document = []
    yield "".join(document).strip("\r\n")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and JSON object of each line that is not blank.

    Raises:
        InputError: a line is not a JSON object.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number} is not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise InputError(f"{path}: line {number} is nested too deeply; a JSON object was expected") from None
        except ValueError as error:  # an integer of too many digits
            raise InputError(f"{path}: line {number} is not JSON that can be used: {first_line(error)}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number} holds a {type(row).__name__}; a JSON object was expected")
        yield number, row


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, row in read_rows(path):
        text = row.get("text")
        if not isinstance(text, str):
            fields = ", ".join(row) or "none"
            raise InputError(
                f"{path}: line {number} has the fields {fields}; a field 'text' with a string was expected"
                f"{'' if 'text' in row else OF_CONVERSATIONS}"
            )
        check_text(text, f"{path}: line {number}")
        yield text


def _read_parquet(path: Path) -> Iterator[str]:
    for number, row in enumerate(_parquet_rows(path, "text")):
        text = row["text"]
        if not isinstance(text, str):
            raise InputError(f"{path}: row {number} of 'text' is {text!r:.40}; a string was expected")
        yield text


def _parquet_rows(path: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows, with ``column`` alone or with all columns."""
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column is not None and column not in names:
            raise InputError(f"{path} has the columns {', '.join(names)}; a column {column!r} was expected")
        for batch in file.iter_batches(batch_size=256, columns=None if column is None else [column]):
            yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as parquet: {first_line(error)}") from error


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(place, row)`` for each row of a JSON Lines or Parquet file, and nothing for other files.

    ``row`` has all fields; ``place`` says in words, for errors, where the row is.

    Raises:
        InputError: the file cannot be read; the line or row is named.
    """
    if path.name.endswith(JSON_LINES):
        yield from ((f"{path}: line {number}", row) for number, row in read_rows(path))
    elif path.suffix == ".parquet":
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(_parquet_rows(path)))


# function that yields the texts of a file, by suffix
READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".txt.xz": _read_txt,
    **dict.fromkeys(JSON_LINES, _read_jsonl),
    ".parquet": _read_parquet,
}
