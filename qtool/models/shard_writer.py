"""Writing a safetensors file tensor by tensor, so that no more than one tensor is in memory.

The places of all tensors follow from their dtypes and shapes, so the header is written first, and each tensor then goes
to its place in whatever order it comes. The file gets its name when it is complete, flushed and read back.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from qtool.system.errors import RunError

# names of dtypes in safetensors files
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}  # the reverse
PIECE = 1 << 24  # bytes read at once when a file is read back


class Described(NamedTuple):
    """The dtype and the shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardWriter:
    """A safetensors file that is written tensor by tensor, inside a ``with`` block; it has its name after the block."""

    def __init__(self, file: Path, tensors: Mapping[str, Described]) -> None:
        """Open ``file`` under another name, and write the header of all ``tensors``."""
        self._file, self._tensors = file, dict(tensors)
        # larger items first: readers map a tensor as it lies, which must be a multiple of its item's size
        order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        ends, at = {}, 0
        for name in order:
            ends[name] = (at, at := at + tensors[name].num_bytes)
        listed = {
            name: {"dtype": NAMES[tensors[name].dtype], "shape": [*tensors[name].shape], "data_offsets": [*ends[name]]}
            for name in order
        }
        header = json.dumps({"__metadata__": {"format": "pt"}, **listed}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._starts = {name: 8 + len(header) + start for name, (start, _) in ends.items()}
        self._hashes: dict[str, bytes] = {}
        self._partial = file.with_name(f"{file.name}.partial")
        self._opened = self._partial.open("wb")
        self._opened.write(len(header).to_bytes(8, "little") + header)
        self._opened.truncate(8 + len(header) + at)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place."""
        expected = self._tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == expected, f"{name} was planned as {expected}"
        self._opened.seek(self._starts[name])
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._opened.write(content)
        self._hashes[name] = hashlib.sha256(content).digest()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Flush the file, compare it with what was written, and give it its name; after an error, remove it.

        Raises:
            RunError: a tensor that was read differs from the one that was written.
        """
        if kind is not None:
            self._opened.close()
            self._partial.unlink(missing_ok=True)
            return
        assert self._hashes.keys() == self._tensors.keys(), "a tensor that was planned was not written"
        self._opened.flush()
        os.fsync(self._opened.fileno())
        self._opened.close()
        with self._partial.open("rb") as written:
            for name, described in self._tensors.items():
                written.seek(self._starts[name])
                found, left = hashlib.sha256(), described.num_bytes
                while left and (piece := written.read(min(left, PIECE))):
                    found.update(piece)
                    left -= len(piece)
                if found.digest() != self._hashes[name]:
                    raise RunError(
                        f"{name} read back from {self._partial} differs from what was written; the disk may be failing"
                    )
        self._partial.rename(self._file)
