"""Text from files and from the Hugging Face hub, read only as far as it is needed, every fault with its place."""

import json
import lzma
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from qtool.system.errors import InputError

PROBE_SECONDS = 5.0


class UnreachableError(InputError):
    """Data is not on this machine, and the hub cannot be reached or does not have it."""


def check_file(path: Path, known: Sequence[str]) -> None:
    """The cheap checks of a file of text or tokens.

    Raises:
        InputError: it does not exist, is no file, is empty, or has none of the suffixes ``known``.
    """
    if not path.exists():
        raise InputError(f"data.source: there is no file {path}")
    if not path.is_file():
        raise InputError(f"data.source: {path} is a folder; give a file that ends in {', '.join(known)}")
    if not path.name.endswith(tuple(known)):
        raise InputError(f"data.source: {path} has a suffix that cannot be read; known are {', '.join(known)}")
    if not path.stat().st_size:
        raise InputError(f"data.source: {path} is empty")


def read_file(path: Path) -> Iterator[str]:
    """The texts in a file, in order.

    Raises:
        InputError: with the line, byte or row where the file cannot be read.
    """
    suffix = next(suffix for suffix in READERS if path.name.endswith(suffix))
    return READERS[suffix](path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line."""
    offset = 0
    try:
        with lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                offset += len(line)
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise InputError(
            f"{path} is not UTF-8: line {number}, byte {at} of the file is 0x{error.object[error.start]:02x} "
            f"({error.reason}); convert it, for example with iconv -t UTF-8"
        ) from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _read_txt(path: Path) -> Iterator[str]:
    """Documents of a plain text file; two or more empty lines end a document."""
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
    """Line number and JSON object of each line that is not blank.

    Raises:
        InputError: a line that is not a JSON object.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number} is not JSON: {error.msg} at column {error.colno}") from None
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
            )
        yield text


def _read_parquet(path: Path) -> Iterator[str]:
    for number, row in enumerate(_parquet_rows(path, "text")):
        text = row["text"]
        if not isinstance(text, str):
            raise InputError(f"{path}: row {number} of 'text' is {text!r:.40}; a string was expected")
        yield text


def _parquet_rows(path: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows, with ``column`` alone or with all."""
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column is not None and column not in names:
            raise InputError(f"{path} has the columns {', '.join(names)}; a column {column!r} was expected")
        for batch in file.iter_batches(batch_size=256, columns=None if column is None else [column]):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a ``.jsonl`` or ``.parquet`` file with all its fields, after its place in words; none of a text file.

    Raises:
        InputError: with the line or row where the file cannot be read.
    """
    if path.suffix == ".jsonl":
        yield from ((f"{path}: line {number}", row) for number, row in read_rows(path))
    elif path.suffix == ".parquet":
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(_parquet_rows(path)))


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".txt.xz": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


@cache
def _hub_answers() -> bool:
    """Whether a connection to the hub can be made, or is left to a proxy."""
    from huggingface_hub import constants

    if getproxies().get("https"):
        return True
    url = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def hub_access() -> Iterator[None]:
    """Inside, libraries use the hub; when it does not answer, only what it left in its cache on this machine.

    Left to themselves they try for half a minute before they say so.
    """
    if _hub_answers():
        yield
        return
    import datasets
    from huggingface_hub import constants

    with replaced(constants, "HF_HUB_OFFLINE", True), replaced(datasets.config, "HF_HUB_OFFLINE", True):
        yield


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Inside, ``owner.name`` is ``value``."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Hub(NamedTuple):
    """A data set on the hub, and how it is read."""

    repository: str
    name: str | None = None  # of the configuration
    streaming: bool = False  # rows are fetched as they are asked for; otherwise the split is downloaded whole
    files: str | None = None  # pattern of JSON Lines files to read, where the repository has a script for a loader
    sorted: bool = False  # by origin: read in an order of its own, drawn once, so that its beginning is a fair sample


def load_hub(hub: Hub, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a data set on the hub.

    Raises:
        UnreachableError: it cannot be had.
    """
    import datasets

    try:
        with hub_access():
            if hub.files is None:
                rows = datasets.load_dataset(hub.repository, hub.name, split=split, streaming=hub.streaming)
            else:  # as lines: the fields beside the text differ from file to file, which no table can hold
                files = f"hf://datasets/{hub.repository}/{hub.files}"
                rows = datasets.load_dataset("text", data_files={split: files}, split=split, streaming=hub.streaming)
        for row in rows.shuffle(seed=0) if hub.sorted else rows:
            yield row if hub.files is None else json.loads(row["text"])
    except Exception as error:  # the hub's clients raise many kinds, and all of them mean: there is no such data here
        raise UnreachableError(
            f"{hub.repository} cannot be read from the Hugging Face hub ({first_line(error)})"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error that says something, or its kind."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
