"""The native checkpoint: the only place that knows its tensor names, its config section and its files.

A folder as Hugging Face writes it: ``config.json`` with ``quantization_config``, safetensors shards, tokenizer files,
and last ``qtool.json``, whose presence means that the write finished. A quantized linear ``p`` is ``p.weight_packed``
int32 ``[out, ceil(in b / 32)]``, ``p.weight_scale`` ``[out, groups]``, ``p.weight_shape`` int64 ``[2]``, and
``p.weight_zero_point`` int32 ``[ceil(out b / 32), groups]`` (packed along rows) when the grid is asymmetric: the names
and layout of compressed-tensors' ``pack-quantized``. ``p.weight`` is one byte that makes other loaders stop.
"""

import copy
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtool.checkpoints.quantization_config import describe, specs_of
from qtool.config.sections import PARTS, SCALE_BITS, QuantSpec
from qtool.models.folders import read_config
from qtool.models.loading import LoadedModel
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packed_linear import PackedLinear
from qtool.system import memory
from qtool.system.errors import InputError, RunError

MANIFEST = "qtool.json"
MAX_SHARD_SIZE = "4GB"
HEADER_BYTES = 64  # at most, of a safetensors file without its list of tensors


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool, source: Path | None = None) -> Iterator[Path]:
    """A folder ``<path>.partial`` to write into, renamed to ``path`` when the block ends well, removed when not.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is not set, its parent cannot be written, or it holds ``source``.
        RunError: the disk is full.
    """
    check_folder(path, overwrite=overwrite, source=source)
    partial = path.with_name(f"{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror} ({error.filename})") from None
    replaced = None
    try:
        yield partial
        if path.exists():
            replaced = swap(path, partial)
        else:
            partial.rename(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise failed(path, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def failed(path: Path, error: Exception) -> RunError:
    """What ``error`` means for a folder that was being written."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = "No space left" in str(error) or getattr(error, "errno", None) in codes
    reason = "the disk is full" if full else str(error)
    left = "the old folder is as it was" if path.exists() else "nothing was left under that name"
    return RunError(f"writing {path} failed: {reason}; {left}")


def check_folder(path: Path, *, overwrite: bool, source: Path | None) -> None:
    """Whether ``path`` may be written or replaced.

    Raises:
        InputError: it may not.
    """
    if not path.name:
        raise InputError(f"{path} cannot be the output folder; give it a name")
    if source is not None:
        here, there = path.resolve(), source.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise InputError(f"{path} is, holds or lies in {source}, which is read; choose another folder")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"{path} cannot be written: {above} is a file")
    if not path.exists():
        return
    if not path.is_dir() or not ((path / "config.json").exists() or not any(path.iterdir())):
        raise InputError(f"{path} exists and is not a model folder, so it will not be replaced; choose another folder")
    if not overwrite:
        raise InputError(f"{path} exists; choose another folder, or pass --overwrite to replace it")


def swap(path: Path, partial: Path) -> Path:
    """Put ``partial`` in the place of ``path``; returns where the old folder went, to be removed."""
    path = path.resolve()  # through a link: the folder is replaced, the link stays
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    path.rename(aside / path.name)
    try:
        partial.rename(path)
    except OSError:
        (aside / path.name).rename(path)
        aside.rmdir()
        raise
    return aside


def check_space(path: Path, needed: int) -> None:
    """Refuse to start when ``needed`` bytes do not fit where ``path`` will be."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{path} needs about {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free")


def as_stored(tensors: dict[str, Tensor], packed: Collection[str], loaded: LoadedModel) -> dict[str, Tensor]:
    """Tensors of a model as its checkpoint holds them: on CPU, and what stays float in its file's dtype.

    ``packed``: names of quantized linears, whose parts stay as they are. Of tied tensors the first is kept:
    transformers ties them again when it loads.
    """
    parts = {f"{name}.{part}" for name in packed for part in PARTS}
    originals = Files(loaded.folder)
    pages = memory.Pages()
    stored: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key in seen:
            continue
        seen.add(key)
        if name not in parts and tensor.is_floating_point():
            if name in loaded.file_dtypes and name not in originals.names:
                raise RunError(f"{name} is no longer in {loaded.folder}; put its file back and run the command again")
            # the file's own tensor, unless a method changed it; the model may compute in less than the file holds
            own = originals.tensor(name) if name in originals.names else tensor.to(loaded.storage_dtype)
            if not torch.equal(own.to(tensor), tensor):
                own = tensor.to(own.dtype)
            if torch.equal(own.to(tensor), tensor):  # else the changed value needs more
                pages.drop(own, tensor)  # the file holds them
                tensor = own
        stored[name] = tensor.detach().cpu().contiguous()
    return stored


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


def clear(folder: Path) -> None:
    """Remove everything in ``folder``."""
    shutil.rmtree(folder)
    folder.mkdir()


def save(folder: Path, loaded: LoadedModel, specs: dict[str, QuantSpec]) -> None:
    """Write everything but the manifest and the model card into ``folder``; ``specs`` are the quantized linears.

    What a streamed run has written there, one shard for each block, stays; the rest is added.

    Raises:
        RunError: what was read back is not what was written.
    """
    rest = folder / shard_name(0, len(loaded.blocks()))
    rest.unlink(missing_ok=True)  # of a run that was killed after it
    written = Files(folder)
    tensors = {k: v for k, v in loaded.model.state_dict().items() if k not in written.names and v.device.type != "meta"}
    tensors = as_stored(tensors, specs, loaded)
    if written.names:
        write_shard(tensors, rest)
        write_index(folder)
    else:
        write_shards(tensors, folder)
    config = copy.deepcopy(loaded.model.config)
    config.dtype = loaded.storage_dtype
    config.quantization_config = describe(specs)
    config.save_pretrained(folder)
    if loaded.model.can_generate() and loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


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


class Source:
    """A native checkpoint, read tensor by tensor: where exporters and verification start. No model is built."""

    def __init__(self, folder: Path) -> None:
        """Open ``folder``; reads only its config and the shards' headers."""
        self.folder = folder
        self.config = read_config(folder)
        if "quantization_config" not in self.config:
            raise InputError(f"{folder} is a float model; a qtool checkpoint is needed (qtool ptq makes one)")
        try:
            self.specs = specs_of(self.config["quantization_config"])
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None

    @cached_property
    def _files(self) -> Files:
        return Files(self.folder)

    @property
    def manifest(self) -> dict[str, Any]:
        """``qtool.json``, empty when the folder was written by ``save_pretrained``."""
        file = self.folder / MANIFEST
        if not file.exists():
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            _ = found["recipe"]["model"]["path"], found["recipe"]["method"]["name"], found["label"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged ({error!r}); remove it to use the folder without it") from None
        return dict(found)

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored."""
        if name not in self._files.names:
            raise InputError(f"{self.folder} lacks the tensor {name}; the checkpoint is incomplete")
        return self._files.tensor(name)

    def quantized(self, name: str) -> QuantizedWeight:
        """Codes, scale and zero point of the linear ``name``."""
        spec = self.specs[name]
        out_features, in_features = self.tensor(f"{name}.weight_shape").tolist()
        layer = PackedLinear(in_features, out_features, spec)
        for part, _ in list(layer.named_buffers()):
            setattr(layer, part, self.tensor(f"{name}.{part}"))
        layer.check(f"{self.folder}: {name}")
        return layer.quantized

    def float_names(self) -> list[str]:
        """Tensors that are not part of a quantized weight, biases of quantized linears included."""
        packed = {f"{name}.{part}" for name in self.specs for part in PARTS}
        return [name for name in self._files.names if name not in packed]

    def num_bytes(self) -> int:
        """Size of the safetensors files."""
        return folder_bytes(self.folder)


class Planned(Source):
    """The checkpoint that a run is about to make, for asking an exporter early; its scales are not known yet."""

    def __init__(self, loaded: LoadedModel, specs: dict[str, QuantSpec], shapes: dict[str, tuple[int, int]]) -> None:
        """Describe what ``loaded`` becomes with these grids."""
        self.folder = loaded.folder
        self.config = {"dtype": str(loaded.storage_dtype).removeprefix("torch.")}
        self.specs = specs
        self._tensors = {f"{name}.weight_shape": torch.tensor(shape) for name, shape in shapes.items()}
        # not known yet: a value that needs every bit of its dtype stands for all scales
        worst = {dtype: 1 + torch.finfo(getattr(torch, dtype)).eps for dtype in SCALE_BITS}
        self._tensors |= {
            f"{name}.weight_scale": torch.tensor([worst[spec.scale_dtype]]) for name, spec in specs.items()
        }
        quantized = {f"{name}.weight" for name in specs}
        self._tensors |= {k: v for k, v in loaded.model.state_dict().items() if k not in quantized}

    def tensor(self, name: str) -> Tensor:
        """A tensor that is known before the run."""
        return self._tensors[name]

    def float_names(self) -> list[str]:
        """Tensors that stay in floating point."""
        return [name for name in self._tensors if not name.endswith((".weight_shape", ".weight_scale"))]


def folder_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a model folder, or of its GGUF files where it has no others."""
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.gguf")]
    return sum(os.path.getsize(file) for file in files)


def bits_per_weight(specs: dict[str, QuantSpec], shapes: dict[str, tuple[int, int]]) -> float:
    """Average stored bits of the quantized weights, scales and zero points counted."""
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    bits = sum(spec.bits_per_weight(shapes[name][1]) * sizes[name] for name, spec in specs.items())
    return bits / sum(sizes.values())


def packed_parts(name: str, spec: QuantSpec, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of a quantized linear ``(out, in)``, by full name, on the meta device."""
    with torch.device("meta"):
        return {f"{name}.{part}": tensor for part, tensor in PackedLinear(*shape[::-1], spec).named_buffers()}


def planned_bytes(loaded: LoadedModel, specs: dict[str, QuantSpec], shapes: dict[str, tuple[int, int]]) -> int:
    """The most that weight files with these grids take, headers included.

    Norms and biases are counted in float32: methods that change them may store them so.
    """
    tensors: dict[str, Tensor] = {}
    state = {name: t for name, t in loaded.model.state_dict().items() if name.removesuffix(".weight") not in specs}
    for name in {(t.data_ptr(), t.shape): name for name, t in reversed(state.items())}.values():  # tied: the first name
        dtype = loaded.file_dtypes.get(name, state[name].dtype)
        grows = dtype.is_floating_point and state[name].dim() < 2
        tensors[name] = state[name].to("meta", torch.promote_types(dtype, torch.float32) if grows else dtype)
    for name, spec in specs.items():
        tensors |= packed_parts(name, spec, shapes[name])
    size = sum(t.nbytes for t in tensors.values())
    listed = {name: {"dtype": "BF16", "shape": [*t.shape], "data_offsets": [size, size]} for name, t in tensors.items()}
    return size + len(json.dumps(listed, separators=(",", ":"))) + HEADER_BYTES * (len(loaded.blocks()) + 1)
