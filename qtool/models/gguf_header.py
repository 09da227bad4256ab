"""The header of a GGUF file: its metadata, and the name, type, shape and place of each tensor.

Files of others are checked here before a library opens them: a library maps the whole file, builds its vocabulary, and
raises errors of many kinds for a damaged one. The layout (version 2 and 3, little endian) is that of the format's
specification in ggml: magic, version, counts of tensors and of keys, the keys with their values, the tensors, and after
padding the data, in which each tensor has its offset.
"""

import struct
from collections import Counter
from functools import lru_cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

from qtool.system.errors import InputError

VERSIONS = (2, 3)
# format of a value of fixed size, by the number of its type: integers of 8 to 64 bits, float32 and float64, bool
FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LONGEST = 4096  # most numbers of an array that is kept; vocabularies are longer
MOST_AXES = 8  # ggml has four
ALIGNMENT = 32  # of tensors, where the file names none


class Stored(NamedTuple):
    """A tensor of the file."""

    name: str
    kind: str  # name of its type, e.g. Q4_K
    shape: tuple[int, ...]  # in the order of torch: rows first
    num_weights: int


class Header(NamedTuple):
    """The metadata, without long arrays and those of strings, and the tensors."""

    metadata: dict[str, Any]
    tensors: tuple[Stored, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str) -> Any:
        """Return a value of the architecture; ``None`` if the file has no such key."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def kinds(self) -> str:
        """Return the types of the tensors and their counts, the most frequent first, for users."""
        counts = Counter(tensor.kind for tensor in self.tensors).most_common()
        parts = [f"{kind} ({count})" for kind, count in counts]
        parts[0] = f"{counts[0][0]} ({counts[0][1]} tensors)"
        return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


class _Reader:
    """The bytes of the header, read from front to back."""

    def __init__(self, content: mmap) -> None:
        self.content, self.at = content, 0

    def numbers(self, format: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{format}", self.content, self.at)
        self.at += struct.calcsize(f"<{format}")
        return found

    def text(self) -> str:
        (length,) = self.numbers("Q")
        start, self.at = self.at, self.at + length
        if self.at > len(self.content):
            raise ValueError("a text ends behind the end of the file")
        return self.content[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind in FIXED:
            return self.numbers(FIXED[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a value is of the unknown type {kind}")
        inner, count = self.numbers("IQ")
        if inner in FIXED and count <= LONGEST:
            return list(self.numbers(f"{count}{FIXED[inner]}"))
        if inner in FIXED:
            self.at += count * struct.calcsize(f"<{FIXED[inner]}")
        elif inner == STRING:
            for _ in range(count):
                (length,) = self.numbers("Q")
                self.at += length
        else:
            raise ValueError(f"an array holds values of the type {inner}")
        return None


def read_header(file: Path) -> Header:
    """Return the header of a GGUF file.

    Raises:
        InputError: the file is no GGUF file, is truncated or damaged, or holds a type that the ``gguf`` package lacks.
    """
    status = file.stat()
    return _read(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)  # a run asks for the header of its model several times; time and size detect a changed file
def _read(file: Path, modified: int, size: int) -> Header:
    with file.open("rb") as opened:
        magic = opened.read(4)
        if magic != b"GGUF":
            what = "is empty" if not size else f"begins with {magic!r}, not with b'GGUF'"
            raise InputError(f"{file} {what}: it is no GGUF file; copy or download it again")
        with mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
            try:
                return _header(file, _Reader(content), size)
            except (struct.error, ValueError, TypeError, OverflowError, MemoryError) as error:
                raise InputError(f"{file} is truncated or damaged ({error}); copy or download it again") from None


def _header(file: Path, reader: _Reader, size: int) -> Header:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    version, num_tensors, num_keys = reader.numbers("4xIQQ")
    if version not in VERSIONS:
        raise InputError(
            f"{file} is GGUF of version {version}; versions {' and '.join(map(str, VERSIONS))} in little endian are "
            "read: write it again with a newer llama.cpp"
        )
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key, (kind,) = reader.text(), reader.numbers("I")
        metadata[key] = reader.value(kind)
    tensors, end = [], 0
    for _ in range(num_tensors):
        name, (axes,) = reader.text(), reader.numbers("I")
        if axes > MOST_AXES:
            raise ValueError(f"{name} has {axes} axes")
        shape, (number, offset) = reader.numbers(f"{axes}Q"), reader.numbers("IQ")
        if number not in GGMLQuantizationType.__members__.values():
            raise InputError(
                f"{file}: {name} is of type {number}, which the package gguf does not know; a newer gguf may, or take "
                "a file of the model in another type"
            )
        block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        count = 1
        for length in shape:
            count *= length
        tensors.append(Stored(name, GGMLQuantizationType(number).name, tuple(reversed(shape)), count))
        end = max(end, offset + count // block * num_bytes)
    alignment = metadata.get("general.alignment") or ALIGNMENT
    end += -(-reader.at // alignment) * alignment
    if tensors and end > size:
        raise InputError(
            f"{file} is truncated: it has {size:,} bytes, and its tensors end at {end:,}; copy or download it again"
        )
    return Header(metadata, tuple(tensors))
