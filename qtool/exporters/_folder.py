"""What every export writes the same way, and reads back without the code that wrote it."""

import shutil
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qtool.checkpoints.files import Files, write_json, write_shards
from qtool.checkpoints.native import Source
from qtool.config.sections import ExportConfig
from qtool.models.folders import read_config

NOT_COPIED = ("config.json", "qtool.json", "README.md", "report.html", "report.json", "report.md")


class WrittenFolder:
    """A written folder of safetensors files, opened once; a format that stores otherwise has a subclass."""

    def __init__(self, folder: Path, marker: str = "") -> None:
        """Open ``folder``; ``marker`` is the tensor that each packed linear of the format has, ``""`` if none is."""
        self.folder, self._marker = folder, marker
        self._files = Files(folder)

    def names(self) -> list[str]:
        """Every tensor, by name."""
        return list(self._files.names)

    def tensor(self, name: str) -> Tensor:
        """A tensor that is no quantized weight, with the values that it has in the float model."""
        return self._files.tensor(name)

    def packed(self) -> set[str]:
        """The quantized linears."""
        return {name.rpartition(".")[0] for name in self.names() if self._marker and name.endswith(f".{self._marker}")}

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the model is made from: ``config.json``, and whatever else says so."""
        return read_config(self.folder)


def quantization_section(folder: Path) -> dict[str, Any]:
    """What the ``config.json`` of a folder says about how its weights are quantized."""
    section: dict[str, Any] = read_config(folder).get("quantization_config") or {}
    return section


def names_method(method: str, folder: Path) -> bool:
    """Whether the quantization config of a folder is of this ``quant_method``."""
    return quantization_section(folder).get("quant_method") == method


def write_folder(
    folder: Path, out: Path, tensors: dict[str, Tensor], section: dict[str, Any] | None, dtype: str
) -> None:
    """Shards, if any, ``folder``'s config with ``section`` as its quantization config, and its tokenizer's files."""
    if tensors:
        write_shards(tensors, out)
    config = {key: value for key, value in read_config(folder).items() if key != "quantization_config"}
    config["dtype"] = dtype
    write_json(out / "config.json", config | ({"quantization_config": section} if section else {}))
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name not in NOT_COPIED and ".safetensors" not in file.name:
            shutil.copy(file, out / file.name)


def float_tensors(source: Source, config: ExportConfig, default: str) -> tuple[dict[str, Tensor], str]:
    """Tensors that are no quantized weight, in ``config.dtype`` (``auto``: ``default``), and that dtype's name.

    With ``auto`` a tensor that ``default`` does not hold, such as a norm that a method changed, stays as it is stored.
    """
    name = default if config.dtype == "auto" else config.dtype
    tensors = {key: source.tensor(key) for key in source.float_names()}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not (config.dtype == "auto" and inexact([tensor], name)):
            tensors[key] = tensor.to(getattr(torch, name))
    return tensors, name


def unfit(source: Source, config: ExportConfig) -> str | None:
    """Why the dtype that was asked for by name cannot be used: a tensor that it does not hold exactly."""
    if config.dtype == "auto":
        return None
    for name in source.float_names():
        tensor = source.tensor(name)
        if tensor.is_floating_point() and inexact([tensor], config.dtype):
            return f"{name} is not held exactly by {config.dtype}; use dtype: auto"
    return None


def float_zeros(source: Source, format: str) -> str | None:
    """Why a format cannot hold the checkpoint: a linear whose zero points lie between codes."""
    name = next((name for name, spec in source.specs.items() if spec.float_zero), None)
    if name is None:
        return None
    return (
        f"{name} has zero points between codes (float_zero), and {format} does not hold those exactly; "
        "export dense instead, or quantize with float_zero: false"
    )


def stored_dtype(source: Source) -> str:
    """The dtype that the checkpoint's config names."""
    return str(source.config.get("dtype", "float32"))


def inexact(tensors: Iterable[Tensor], dtype: str) -> float:
    """Largest change when the tensors are rounded to ``dtype``, as a share of each one's largest value; 0 if exact."""
    worst = 0.0
    for tensor in tensors:
        change = (tensor.to(getattr(torch, dtype)).float() - tensor.float()).abs()
        if change.any():
            worst = max(worst, float(change.amax() / tensor.float().abs().amax()))
    return worst


def skeleton(folder: Path) -> nn.Module:
    """The model of a folder's ``config.json`` without weights, as plain float modules. Only look at it."""
    return _skeleton(folder, (folder / "config.json").read_bytes())


@lru_cache(maxsize=2)  # asked for once per linear; the text tells two folders of one name apart
def _skeleton(folder: Path, config_text: bytes) -> nn.Module:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def transposed(source: Source) -> set[str]:
    """Quantized linears that the float model stores as ``[in, out]`` (GPT-2's ``Conv1D``)."""
    return {name for name, module in skeleton(source.folder).named_modules() if isinstance(module, Conv1D)}


def conv1d(source: Source, why: str) -> str | None:
    """That a linear is a ``Conv1D``, and ``why`` a format does not hold one; ``None`` when there is none."""
    flipped = transposed(source)
    return f"{min(flipped)} is a Conv1D, {why}; export dense instead" if flipped else None


def float_linears(source: Source) -> list[str]:
    """Linears of the model that the checkpoint leaves in floating point, the head among them."""
    return [
        name
        for name, module in skeleton(source.folder).named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in source.specs
    ]


def shared_block_prefix(source: Source) -> str:
    """What the names of all decoder blocks begin with, e.g. ``model.layers.``."""
    first = next(iter(source.specs))
    parts = first.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit())]) + "."


def unpack_bits(words: Tensor, num_bits: int, count: int) -> Tensor:
    """Codes of each row of ``words`` ``[rows, w]`` int32, by expansion to single bits: the witness of the packer."""
    rows = []
    for row in words.numpy().astype("<i4"):
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")[: count * num_bits].reshape(count, num_bits)
        rows.append((bits * (1 << np.arange(num_bits))).sum(1))
    return torch.from_numpy(np.stack(rows)).float()
