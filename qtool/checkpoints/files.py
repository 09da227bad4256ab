"""Safetensors and JSON files of a checkpoint: written durably, read back, hashed, and read tensor by tensor."""

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtool.system import memory
from qtool.system.errors import InputError, RunError

MAX_SHARD_SIZE = "4GB"


def write_durably(file: Path, content: dict[str, Any]) -> None:
    """JSON that is on the disk, whole, when this returns."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as text:
        json.dump(content, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    partial.rename(file)


def write_shard(tensors: dict[str, Tensor], file: Path) -> None:
    """One safetensors file, on the disk when this returns, and read back.

    Raises:
        RunError: what was read is not what was written.
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


def write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Safetensors file(s), with an index when there are several."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        write_shard({name: tensors[name] for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Readable JSON that ends in a newline."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shard_name(index: int, num_blocks: int) -> str:
    """The file of block ``index - 1``; shard 0 is what lies around the blocks."""
    return f"model-{index + 1:05d}-of-{num_blocks + 1:05d}.safetensors"


def write_index(folder: Path) -> None:
    """The index of the shards in ``folder``."""
    weight_map, total = {}, 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in sorted(reader.keys()):
                weight_map[name] = file.name
                tensor = reader.get_tensor(name)
                total += tensor.nbytes
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def file_hashes(folder: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 of each file that matches, by name."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    hashes = {}
    for file in files:
        with file.open("rb") as content:
            hashes[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashes


class Files:
    """The tensors of a folder's safetensors files."""

    def __init__(self, folder: Path, pattern: str = "*.safetensors") -> None:
        """Open every file that matches; only headers are read."""
        self._readers: dict[str, Any] = {}
        for file in sorted(folder.glob(pattern)):
            try:
                reader = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise InputError(f"{file} is truncated or damaged ({error})") from None
            self._readers |= dict.fromkeys(reader.keys(), reader)  # type: ignore[no-untyped-call]

    @property
    def names(self) -> Collection[str]:
        """Every tensor."""
        return self._readers.keys()

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored."""
        tensor: Tensor = self._readers[name].get_tensor(name)
        return tensor


def folder_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a model folder, or of its GGUF files where it has no others."""
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.gguf")]
    return sum(os.path.getsize(file) for file in files)
