"""Text sources: the table of named ones, the check of ``data.source``, and their texts and rows.

A data source is one row of ``SOURCES``. Its file below :func:`data_dir` comes first, the Hugging Face hub second.
``generated`` needs neither: the model writes the text itself (``generated.py``).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from qtool.config.sections import DataConfig
from qtool.data.hub import Hub, UnreachableError, load_hub
from qtool.data.readers import READERS, check_file, read_file, read_records
from qtool.data.token_files import SUFFIXES
from qtool.system import paths
from qtool.system.errors import InputError, nearest

GENERATED = "generated"  # name of the source that the model writes itself
T = TypeVar("T")
Row = dict[str, Any]  # Any: whatever fields a data set has


class TextSource(NamedTuple):
    """A named source: its file below ``data_dir()``, its data set on the hub, and the kind of its rows."""

    file: str
    hub: Hub
    rows: Literal["documents", "lines", "conversations"]  # "lines" are of one text, and joined by two newlines


SOURCES: dict[str, TextSource] = {
    "wikitext2": TextSource("wikitext2/{split}.jsonl", Hub("Salesforce/wikitext", "wikitext-2-raw-v1"), "lines"),
    "enwiki": TextSource(
        "enwiki/{split}.txt.xz", Hub("wikimedia/wikipedia", "20231101.en", streaming=True), "documents"
    ),
    "c4": TextSource("c4/{split}.jsonl", Hub("allenai/c4", "en", streaming=True), "documents"),
    "redpajama": TextSource(
        "redpajama/{split}.jsonl",
        Hub("togethercomputer/RedPajama-Data-1T-Sample", files="*.jsonl", sorted=True),
        "documents",
    ),
    # an even sample of 6 of the 627 billion tokens, as parquet; the full data set needs another package to decompress
    "slimpajama": TextSource("slimpajama/{split}.jsonl", Hub("DKYoon/SlimPajama-6B", streaming=True), "documents"),
    "alpaca": TextSource("alpaca/{split}.jsonl", Hub("tatsu-lab/alpaca"), "conversations"),
    "deita": TextSource("deita/{split}.jsonl", Hub("hkust-nlp/deita-10k-v0"), "conversations"),
}
C4_SHARD = "c4-validation.00000-of-00008.json.gz"  # the file of C4 on whose documents papers measure perplexity
C4_FILES = ("c4/validation.jsonl", f"c4/{C4_SHARD}", f"c4/en/{C4_SHARD}")  # where it is looked for on this machine
FILES = (*READERS, *SUFFIXES)  # suffixes of files that can be a data.source


def data_dir() -> Path | None:
    """Return the folder of local data that ``QTOOL_DATA_DIR`` names; ``None`` if the variable is unset or empty.

    Raises:
        InputError: ``QTOOL_DATA_DIR`` names no folder.
    """
    chosen = os.environ.get("QTOOL_DATA_DIR")
    if not chosen:
        return None
    if not Path(chosen).is_dir():
        raise InputError(f"QTOOL_DATA_DIR is {chosen}, which is not a folder; correct or unset it")
    return Path(chosen)


def check_source(data: DataConfig) -> None:
    """Refuse a ``data.source`` that is neither a known name nor a file that exists and has a known suffix.

    Raises:
        InputError: it is neither.
    """
    known = [GENERATED, *SOURCES]
    if data.source in known:
        return
    path = source_path(data)
    if path.name.endswith(FILES) or path.exists():
        check_file(path, FILES)
        return
    hint = nearest(data.source, known, "; did you mean {}?")
    raise InputError(
        f"data.source: {data.source!r} is neither a known name ({', '.join(known)}) "
        f"nor a file that ends in {', '.join(FILES)}{hint}"
    )


def source_path(data: DataConfig) -> Path:
    """Return the path that ``data.source`` means if it is no known name, with ``~`` and variables expanded.

    Raises:
        InputError: it means no path.
    """
    return paths.expand(data.source, "data.source")


def is_local(data: DataConfig) -> bool:
    """Return whether the text of ``data.source`` is a file on this machine."""
    folder = data_dir()
    named = SOURCES.get(data.source)
    if named is None:
        return data.source != GENERATED and source_path(data).is_file()
    return folder is not None and (folder / named.file.format(split="train")).exists()


def source_texts(name: str, split: str) -> Iterator[str]:
    """Yield the texts of the named source ``name``."""
    return _read(name, *_places(name, split), split, read_file, _texts)


def source_records(name: str, split: str) -> Iterator[tuple[str, Row]]:
    """Yield each row of the named source ``name`` with all its fields, and before it its place in words, for errors."""
    return _read(
        name,
        *_places(name, split),
        split,
        read_records,
        lambda rows: ((f"{name}: row {number}", row) for number, row in enumerate(rows)),
    )


def c4_validation() -> Iterator[str]:
    """Yield the documents of C4's first validation file, in order; the local file may be any of ``C4_FILES``."""
    return _read("c4", C4_FILES, Hub("allenai/c4", files=f"en/{C4_SHARD}"), "validation", read_file, _texts)


def _places(name: str, split: str) -> tuple[Sequence[str], Hub]:
    source = SOURCES[name]
    return (source.file.format(split=split),), source.hub


def _texts(rows: Iterator[Row]) -> Iterator[str]:
    return (row["text"] for row in rows)


def _read(
    name: str,
    files: Sequence[str],
    hub: Hub,
    split: str,
    local: Callable[[Path], Iterator[T]],
    remote: Callable[[Iterator[Row]], Iterator[T]],
) -> Iterator[T]:
    """Read ``name`` by ``local`` from the first of ``files`` below ``data_dir()`` that exists, or by ``remote``.

    ``remote`` is given the rows of ``split`` of ``hub``.

    Raises:
        UnreachableError: no file is there, and the hub cannot be reached or does not have the data set.
    """
    folder = data_dir()
    found = [folder / file for file in files if (folder / file).exists()] if folder else []
    if found:
        yield from local(found[0])
        return
    try:
        yield from remote(load_hub(hub, split))
    except UnreachableError as error:
        raise UnreachableError(
            f"{name} is not on this machine, and {error}; put it at $QTOOL_DATA_DIR/{' or '.join(files)} "
            f"(QTOOL_DATA_DIR is {folder or 'not set'}), or use a file of your own as data.source"
        ) from error
