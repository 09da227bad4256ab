"""Safetensors and JSON files of a checkpoint: written durably, read back, hashed, and read tensor by tensor.

A durable file is on the disk, whole, when its function returns: it is written under another name, flushed, and renamed.
So a run that is killed at any moment finds either the old file or the new one.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtool.models.folders import open_safetensors
from qtool.system import memory
from qtool.system.errors import RunError
from qtool.system.writing import write_text

MAX_SHARD_SIZE = "4GB"  # largest safetensors file, if a model is saved as a whole


class SafetensorsFolder:
    """The tensors of all safetensors files of a folder."""

    def __init__(self, folder: Path, pattern: str = "*.safetensors") -> None:
        """Open every file that matches; only headers are read."""
        self._readers: dict[str, Any] = {}
        for file in sorted(folder.glob(pattern)):
            reader = open_safetensors(file)
            self._readers |= dict.fromkeys(reader.keys(), reader)

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._readers.keys()

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as it is stored."""
        tensor: Tensor = self._readers[name].get_tensor(name)
        return tensor


def write_durably(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file durably."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as text:
        json.dump(content, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    partial.rename(file)


def write_shard(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file durably, and read it back.

    Raises:
        RunError: a tensor that was read differs from the one that was written.
    """
    partial = file.with_name(f"{file.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.rename(file)
    with safe_open(file, framework="pt") as reader:
        pages = memory.Pages()
        for name, tensor in tensors.items():
            found = reader.get_tensor(name)
            if not torch.equal(found, tensor):
                raise RunError(f"{name} read back from {file} differs from what was written; the disk may be failing")
            pages.drop(found, tensor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write ``tensors`` to one safetensors file, or to several and an index."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        write_shard({name: tensors[name] for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write indented JSON that ends in a newline."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def shard_name(index: int, num_blocks: int) -> str:
    """Return the file name of shard ``index``: of block ``index - 1``, or for 0 of the tensors outside the blocks."""
    return f"model-{index + 1:05d}-of-{num_blocks + 1:05d}.safetensors"


def write_index(folder: Path) -> None:
    """Write the index of the shards in ``folder``."""
    weight_map, total = {}, 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in sorted(reader.keys()):
                weight_map[name] = file.name
                tensor = reader.get_tensor(name)
                total += tensor.nbytes
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def file_hashes(folder: Path, *patterns: str) -> dict[str, str]:
    """Return the SHA-256 of each file of ``folder`` that matches a pattern, by its path below ``folder``."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    hashes = {}
    for file in files:
        with file.open("rb") as content:
            hashes[file.relative_to(folder).as_posix()] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashes


def changed_files(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return a line for each file that is missing, was changed or was added; both map names to SHA-256."""
    faults = [
        f"{name} is missing" if name not in found else f"{name} was changed after it was written"
        for name, sha256 in expected.items()
        if found.get(name) != sha256
    ]
    return [*faults, *(f"{name} is not in the manifest" for name in sorted(found.keys() - expected.keys()))]


def folder_bytes(folder: Path, weight_files: str = "*.safetensors") -> int:
    """Return the size of a model folder's files with weights, those whose names match ``weight_files``."""
    return sum(os.path.getsize(file) for file in folder.glob(weight_files))
