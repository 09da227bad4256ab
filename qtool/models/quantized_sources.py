"""Models that are published in FP8 or MXFP4, read as the float models that they stand for.

``FloatTensors`` is a model folder with every quantized tensor expanded when it is read, so one tensor is in memory at
a time (``quant/expanding.py`` has the arithmetic). ``expanded`` writes them all as a float model folder, tensor by
tensor: transformers maps that, and everything after it works as for any float model. transformers can expand such
models itself while it loads them, but into memory as a whole, and it refuses weights whose last block is cut off, which
DeepSeek-V3 has.

Known schemes are FP8 (``fp8``: DeepSeek, Kimi K2, Qwen; ``fbgemm_fp8``; ``compressed-tensors`` with float-quantized
weights) and ``mxfp4`` (gpt-oss). Which tensors are quantized is seen from the tensors; the config only names the
scheme. Any other scheme is not expanded.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from qtool.models import gguf_view
from qtool.models.folders import SIDE, belongs, open_safetensors, read_config, weight_files
from qtool.models.gguf_model import GGUFModel
from qtool.models.shard_writer import DTYPES, Described, ShardWriter
from qtool.quant.expanding import FP8, expand_mxfp4, expand_scaled, scale_grid
from qtool.system import memory, progress, reading, units
from qtool.system.errors import InputError
from qtool.system.scratch import process_folder
from qtool.system.writing import write_text

PLAIN = ("fp8", "fbgemm_fp8", "mxfp4")  # names of quantization methods that are expanded
SECTIONS = ("quantization_config", "compression_config")  # keys of a config that say how its weights are quantized
# the scale of the FP8 weight X.weight, or of the parameter X
SCALES = ("{}_scale_inv", "{}_scale")
# the scale of X.weight beside it, as DeepSeek-V4 and Mistral name it
OWN_SCALES = ("scale", "qscale_weight")
# scales of inputs and of the KV cache, which a float model has no use for
ACTIVATION_SCALES = ("activation_scale", "input_scale", "output_scale", "qscale_act", "q_scale", "k_scale", "v_scale")
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"  # ends of the names of the two tensors of an MXFP4 weight

_place: ContextVar[Path | None] = ContextVar("place", default=None)  # folder for expanded models, of a run


def section_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of a ``config.json`` that says how the weights are quantized; empty if there is none."""
    for part in (raw, raw.get("text_config")):
        for key in SECTIONS:
            if isinstance(part, dict) and isinstance(part.get(key), dict) and part[key]:
                return dict(part[key])
    return {}


def is_expandable(raw: Mapping[str, Any]) -> bool:
    """Return whether the weights of a model with the config ``raw`` are quantized in a way that can be expanded."""
    section = section_of(raw)
    if section.get("quant_method") in (*PLAIN, gguf_view.METHOD):
        return True
    groups = section.get("config_groups")
    if section.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict) or not groups:
        return False
    weights = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()]
    return all(isinstance(w, dict) and (w.get("type"), w.get("num_bits")) == ("float", 8) for w in weights)


def float_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` without what it says about quantized weights."""
    text = raw.get("text_config")
    parts = {"text_config": float_config(text)} if isinstance(text, dict) else {}
    return {key: value for key, value in raw.items() if key not in SECTIONS} | parts


class FloatTensors:
    """The tensors of a model folder by name, as the float model has them: quantized ones are expanded when read."""

    def __init__(self, folder: Path) -> None:
        """Open every safetensors file of ``folder``; only headers are read.

        Raises:
            InputError: a file is damaged, or has FP8 weights without scales.
        """
        self.folder, self._raw = folder, read_config(folder)
        self._readers: dict[str, Any] = {}
        self.files: dict[str, list[str]] = {}  # names of the float tensors in each file
        stored: dict[str, list[str]] = {}
        for file in weight_files(folder):
            reader = open_safetensors(file)
            stored[file.name] = list(reader.keys())
            self._readers |= dict.fromkeys(stored[file.name], reader)
        self._quantized = self._find_quantized() if is_expandable(self._raw) else {}
        used = {part for parts in self._quantized.values() for part in parts}
        self.dropped = [] if not self._quantized else [n for n in self._readers if n.endswith(ACTIVATION_SCALES)]
        named = {parts[0]: name for name, parts in self._quantized.items()}
        gone = used | set(self.dropped)
        for file_name, names in stored.items():
            if kept := [named.get(n, n) for n in names if n in named or n not in gone]:
                self.files[file_name] = kept

    @property
    def quantized(self) -> list[str]:
        """The names of the tensors that are expanded."""
        return list(self._quantized)

    @cached_property
    def described(self) -> dict[str, Described]:
        """The dtype and the shape of each tensor, in the order of files."""
        return {name: self._described(name) for names in self.files.values() for name in names}

    def _find_quantized(self) -> dict[str, tuple[str, str]]:
        """Return the names of codes and scales of each quantized tensor by the name of the float tensor."""
        found = {}
        for name in self._readers:
            stored, stem = self._stored(name), name.removesuffix(BLOCKS)
            if stem != name and f"{stem}{BLOCK_SCALES}" in self._readers:
                self._check_blocks(name, stored, self._stored(f"{stem}{BLOCK_SCALES}"))
                found[stem] = (name, f"{stem}{BLOCK_SCALES}")
            elif stored.dtype in (*FP8, torch.int8):
                found[name] = (name, self._scale_of(name, stored))
        return found

    def _check_blocks(self, name: str, blocks: Described, scales: Described) -> None:
        """Refuse the two tensors of an MXFP4 weight if their shapes or dtypes do not fit."""
        if (
            blocks.shape != (*scales.shape, 16)
            or len(scales.shape) < 2
            or {blocks.dtype, scales.dtype} != {torch.uint8}
        ):
            raise InputError(
                f"{self.folder}: {name} is {blocks.dtype} {list(blocks.shape)} and its scales are {scales.dtype} "
                f"{list(scales.shape)}; MXFP4 has bytes [..., rows, groups, 16] and [..., rows, groups]"
            )

    def _scale_of(self, name: str, codes: Described) -> str:
        """Return the name of the scale of the FP8 tensor ``name``, whose shape fits."""
        module = name.removesuffix(".weight")
        scales = [each.format(name) for each in SCALES]
        scales += [f"{module}.{each}" for each in OWN_SCALES if module != name]
        scale = next((each for each in scales if each in self._readers), None)
        if scale is None or not codes.shape:
            raise InputError(
                f"{self.folder}: {name} is stored as {codes.dtype}, and no tensor with its scale ({scales[0]}) is "
                "there; copy or download the model again"
            )
        shape = codes.shape if codes.dtype in FP8 else (*codes.shape[:-1], 2 * codes.shape[-1])
        scale_grid(shape, self._stored(scale).shape, self._block, f"{self.folder}: {name}")
        return scale

    def _stored(self, name: str) -> Described:
        part = self._readers[name].get_slice(name)
        kind = part.get_dtype()
        if kind not in DTYPES:
            raise InputError(f"{self.folder}: {name} is stored as {kind}, which qtool cannot read")
        return Described(DTYPES[kind], tuple(part.get_shape()))

    def _described(self, name: str) -> Described:
        if name not in self._quantized:
            return self._stored(name)
        codes = self._stored(self._quantized[name][0])
        shape = codes.shape
        if name != self._quantized[name][0]:  # MXFP4: [experts, rows, groups, 16]; the model has columns first
            *outer, rows, groups, width = shape
            return Described(torch.bfloat16, (*outer, 2 * groups * width, rows))
        if codes.dtype == torch.int8:
            shape = (*shape[:-1], 2 * shape[-1])
        return Described(torch.bfloat16, shape)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor of the float model."""
        if name not in self._quantized:
            return self._read(name)
        codes, scale = self._read(self._quantized[name][0]), self._read(self._quantized[name][1])
        if name != self._quantized[name][0]:
            weight = expand_mxfp4(codes, scale, name).transpose(-1, -2).contiguous()
        else:
            weight = expand_scaled(codes, scale, self._block, name)
        memory.Pages().drop(codes)
        return weight

    def visit(self, name: str, use: Callable[[Tensor], None]) -> None:
        """Call ``use`` with the tensor ``name``, and free its memory afterwards."""
        tensor = self.tensor(name)
        use(tensor)
        memory.Pages().drop(tensor)

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._readers[name].get_tensor(name)
        return tensor

    @cached_property
    def _block(self) -> tuple[int, int] | None:
        """The rows and columns that share a scale, as the config says."""
        section = section_of(self._raw)
        size = section.get("weight_block_size")
        if section["quant_method"] not in PLAIN:
            sizes = [group["weights"].get("block_structure") for group in section["config_groups"].values()]
            size = next((each for each in sizes if each), None)
        right = isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
        return (size[0], size[1]) if right and size is not None else None

    def status(self) -> list[object]:
        """Return what tells this model from others: the folder, and the sizes and times of change of its files."""
        files = sorted(self.folder.glob("*.safetensors"))
        return [str(self.folder.resolve()), [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]]

    def write(self, out: Path) -> None:
        """Write the float model into ``out``; its config last, which says that the folder is complete.

        Raises:
            InputError: the disk has no room for it.
        """
        _write(self, out)

    def note(self) -> str:
        """Return a sentence that says what is expanded, for users."""
        method = section_of(self._raw).get("quant_method")
        exact = method == "mxfp4"
        how = "exactly" if exact else "code times scale, rounded once to bfloat16, as transformers does"
        text = (
            f"{len(self._quantized)} of {len(self.described)} tensors are stored in "
            f"{'MXFP4' if exact else 'FP8'} ({method}); they are expanded to bfloat16: {how}"
        )
        if self.dropped:
            text += f"; {len(self.dropped)} scale(s) of activations or of the KV cache are left out"
        return text


def refuse_quantized(path: str, raw: Mapping[str, Any]) -> None:
    """Refuse the model ``path`` if its config ``raw`` says that it is quantized in a way that is not expanded."""
    if (section := section_of(raw)) and not is_expandable(raw):
        method = section.get("quant_method", "unknown")
        raise InputError(f"{path} is already quantized ({method}); start from the float model")


def refuse_codes(path: str, folder: Path, raw: Mapping[str, Any]) -> None:
    """Refuse a folder with FP8 tensors, or their scales, whose config ``raw`` does not say that it is quantized.

    transformers would take the codes for weights, and leave the scales out.
    """
    if section_of(raw):
        return
    for file in sorted(folder.glob("*.safetensors")):
        with open_safetensors(file) as reader:
            for name in reader.keys():  # noqa: SIM118  (not a dict)
                dtype = reader.get_slice(name).get_dtype()
                if dtype.startswith("F8") or name.endswith("_scale_inv") or (dtype == "U8" and name.endswith(BLOCKS)):
                    raise InputError(
                        f"{path} holds {name}, a part of a quantized weight, but its config.json has no "
                        "quantization_config that says how to read it; copy the model's own config.json"
                    )


@contextmanager
def expanded_in(folder: Path) -> Iterator[None]:
    """Let ``expanded`` keep its folders in ``folder`` inside the ``with`` block; whoever made it removes it."""
    token = _place.set(folder)
    try:
        yield
    finally:
        _place.reset(token)


def expanded(path: str, folder: Path, raw: Mapping[str, Any], dtype: str = "auto") -> Path:
    """Return a float model folder of the model ``path`` in ``folder``, whose config is ``raw``.

    That is ``folder`` itself if its weights are not quantized in a way that can be expanded. Otherwise a folder is
    written, in the place that ``expanded_in`` says or in a temporary folder of this process; a complete one is used
    again, and a file that an earlier start of a run has written there is kept. The weights of a GGUF file are written
    in ``dtype``, which is ``auto`` or a name, and all others in bfloat16.

    Raises:
        InputError: tensors are damaged, or the disk has no room for the float model.
    """
    if not is_expandable(raw):
        return folder
    is_gguf = section_of(raw).get("quant_method") == gguf_view.METHOD
    source = GGUFModel(folder, dtype) if is_gguf else FloatTensors(folder)
    key = hashlib.sha256(json.dumps([source.status(), raw], sort_keys=True).encode()).hexdigest()[:16]
    place = _place.get()
    out = (process_folder() if place is None else place) / key
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / "lock"):  # another process of the same run may be writing it
        if not (out / "config.json").exists():
            progress.note(f"{path}: {source.note()}")
            source.write(out)
    return out


def _write(source: FloatTensors, out: Path) -> None:
    """Write the float model of ``source`` into ``out``; its config last, which says that the folder is complete."""
    missing = {name: names for name, names in source.files.items() if not (out / name).exists()}
    needed = sum(source.described[name].num_bytes for names in missing.values() for name in names)
    if needed > (free := shutil.disk_usage(out).free):
        raise InputError(
            f"{source.folder} is expanded to {units.size(needed)} in {out}, and the disk has {units.size(free)} free; "
            "free some space, or set TMPDIR, and for a run output.path, to a folder on another disk"
        )
    for name, names in progress.track(missing.items(), "expanding the files of the model", len(missing)):
        with ShardWriter(out / name, {each: source.described[each] for each in names}) as writer:
            for each in names:
                source.visit(each, partial(writer.write, each))
    _copy_others(source.folder, out)
    weight_map = {name: file for file, names in source.files.items() for name in names}
    if [*source.files] != ["model.safetensors"]:
        index = {"metadata": {"total_size": sum(each.num_bytes for each in source.described.values())}}
        write_text(out / "model.safetensors.index.json", json.dumps(index | {"weight_map": weight_map}, indent=2))
    write_text(out / "config.json", json.dumps(float_config(read_config(source.folder)), indent=2))


def _copy_others(folder: Path, out: Path) -> None:
    """Copy the small files beside weights and config; a link that leads out of the folder stays a link."""
    for file in [*folder.iterdir(), *folder.glob("*/*.jinja")]:
        written_here = file.name in ("config.json", "model.safetensors.index.json")
        if written_here or not file.is_file() or not any(fnmatchcase(file.name, pattern) for pattern in SIDE):
            continue
        copy = out / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.unlink(missing_ok=True)
        if belongs(file.resolve(), folder.resolve()):
            copy.write_bytes(reading.read_bytes(file))
        else:
            copy.symlink_to(file.resolve())
