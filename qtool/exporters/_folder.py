"""The parts that export formats share: writing and reading folders, float tensors, and reasons to refuse."""

from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from qtool.checkpoints import side_files, written_config
from qtool.checkpoints.files import SafetensorsFolder, write_json, write_shards
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.sections import ExportConfig
from qtool.models.auto_class import auto_class
from qtool.models.folders import check_files, check_readable, read_config
from qtool.models.loaded import most_common
from qtool.system.errors import InputError, first_line

# names of tensors in published files, by model_type and by the name that transformers 5 gives them when it reads them;
# transformers 4 and mlx-lm know the published name only, and the first fills a head that it misses with random numbers
PUBLISHED = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}}
NONE: Mapping[str, Tensor] = {}  # no tensors: a folder is written without its weights


class WrittenFolder:
    """A written folder of safetensors files, opened once; a format with other files has a subclass."""

    def __init__(self, folder: Path, marker: str = "") -> None:
        """Open ``folder``. Each packed linear ``p`` has a tensor ``p.<marker>``; ``""``: the format packs no linear."""
        self.folder, self._marker = folder, marker
        check_readable(folder)
        self._files = SafetensorsFolder(folder)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        names = {published: name for name, published in self._published.items()}
        return [names.get(name, name) for name in self._files.names]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor outside quantized weights, with the values of the float model."""
        published = self._published.get(name, name)
        return self._files.tensor(published if published in self._files.names else name)

    @cached_property
    def _published(self) -> Mapping[str, str]:
        return PUBLISHED.get(str(self.config.get("model_type")), {})

    def packed(self) -> set[str]:
        """Return the names of the quantized linears."""
        return {name.rpartition(".")[0] for name in self.names() if self._marker and name.endswith(f".{self._marker}")}

    def dtype(self) -> torch.dtype:
        """Return the most common dtype of the float tensors, in which the model computes by default."""
        return most_common(check_files(self.folder))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config: the content of ``config.json``; a format with metadata of its own adds that."""
        return read_config(self.folder)


def quantization_section(folder: Path) -> dict[str, Any]:
    """Return the ``quantization_config`` section of a folder's ``config.json``; empty if it has none."""
    section: dict[str, Any] = read_config(folder).get("quantization_config") or {}
    return section


def names_method(method: str, folder: Path) -> bool:
    """Return whether the ``quant_method`` of a folder's quantization config is ``method``."""
    return quantization_section(folder).get("quant_method") == method


def write_folder(
    folder: Path,
    out: Path,
    tensors: Mapping[str, Tensor],
    section: dict[str, Any] | None,
    dtype: str,
    *,
    any_link: bool = False,
) -> None:
    """Write shards of ``tensors``, the config of ``folder`` with ``section`` and ``dtype``, and its other files.

    ``section`` becomes the ``quantization_config``. Without ``tensors``, only what is beside them is written.
    ``any_link`` is as in ``side_files.copy``.
    """
    side_files.copy(folder, out, any_link=any_link)
    config = {key: value for key, value in read_config(folder).items() if key != "quantization_config"}
    own_head = f"{head_name(folder)}.weight" in tensors
    config = written_config.written(config, None, dtype, False if own_head else None)
    write_json(out / "config.json", config | ({"quantization_config": section} if section else {}))
    if tensors:
        names = PUBLISHED.get(str(config.get("model_type")), {})
        write_shards({names.get(name, name): tensor for name, tensor in tensors.items()}, out)


def head_name(folder: Path) -> str | None:
    """Return the name of the output head of the model in ``folder``; ``None`` if it has none beside its embedding."""
    if not is_known(folder):
        return None
    model: Any = skeleton(folder)
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def float_tensors(source: NativeCheckpoint, config: ExportConfig, default: str) -> tuple[dict[str, Tensor], str]:
    """Return the tensors outside quantized weights in ``config.dtype``, and the name of that dtype.

    ``auto`` is ``default``; then a tensor that ``default`` does not hold exactly keeps its dtype: for example a norm
    that a method changed.
    """
    name = default if config.dtype == "auto" else config.dtype
    tensors = {key: source.tensor(key) for key in source.float_names()}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not (config.dtype == "auto" and inexact([tensor], name)):
            tensors[key] = tensor.to(getattr(torch, name))
    return tensors, name


def unfit(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Return the reason why ``config.dtype`` cannot be used, a tensor that it does not hold exactly, or ``None``."""
    if config.dtype == "auto":
        return None
    if refusal := overflows(source, config, source.float_names()):
        return refusal
    for name in source.float_names():
        tensor = source.tensor(name)
        if tensor.is_floating_point() and inexact([tensor], config.dtype):
            return f"{config.dtype} does not hold {name} exactly; use dtype: auto"
    return None


def overflows(source: NativeCheckpoint, config: ExportConfig, names: Iterable[str]) -> str | None:
    """Return the reason why ``config.dtype`` cannot be used, a tensor or linear that it makes infinite, or ``None``."""
    if config.dtype == "auto":
        return None
    dtype: torch.dtype = getattr(torch, config.dtype)
    for name in names:
        largest = source.largest(name)
        if torch.tensor(largest, dtype=torch.float64).to(dtype).isinf():
            return (
                f"{name} has values of up to {largest:.6g}, and {config.dtype} holds none above "
                f"{torch.finfo(dtype).max:g}; use dtype: auto"
            )
    return None


def float_zeros(source: NativeCheckpoint, format: str) -> str | None:
    """Return the reason why ``format`` cannot hold ``source``, zero points between codes, or ``None``."""
    name = next((name for name, spec in source.specs.items() if spec.float_zero), None)
    if name is None:
        return None
    return (
        f"{name} has zero points between codes (float_zero), and {format} does not hold those exactly; "
        "export dense instead, or quantize with float_zero: false"
    )


def stored_dtype(source: NativeCheckpoint) -> str:
    """Return the dtype that the checkpoint's config names."""
    return str(source.config.get("dtype", "float32"))


def inexact(tensors: Iterable[Tensor], dtype: str) -> float:
    """Return the largest change by rounding to ``dtype``, relative to the largest value of its tensor; 0 if exact."""
    worst = 0.0
    for tensor in tensors:
        exact = tensor if tensor.dtype == torch.float64 else tensor.float()
        change = (tensor.to(getattr(torch, dtype)).to(exact) - exact).abs()
        if change.any():
            worst = max(worst, float(change.amax() / exact.abs().amax()))
    return worst


def skeleton(folder: Path) -> nn.Module:
    """Return the float model of a folder's ``config.json`` on the meta device. It is cached: do not change it."""
    return _skeleton(folder, (folder / "config.json").read_bytes())


@lru_cache(maxsize=2)  # called once per linear; with the text as key, a folder that was written anew is read anew
def _skeleton(folder: Path, config_text: bytes) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model: nn.Module = auto_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many kinds for a config that it cannot use
        raise InputError(
            f"{folder}: transformers makes no model of its config.json: {first_line(error):.200}"
        ) from error
    return model


def is_known(folder: Path) -> bool:
    """Return whether transformers has a class for the model type of a folder."""
    return read_config(folder).get("model_type") in CONFIG_MAPPING


def has_class(source: NativeCheckpoint) -> bool:
    """Return whether transformers has a class with the linears of ``source``; one made without ``model.free`` has."""
    if not source.free:
        return True
    return is_known(source.folder) and source.specs.keys() <= dict(skeleton(source.folder).named_modules()).keys()


def is_conv1d(folder: Path, name: str) -> bool:
    """Return whether the linear ``name`` of the model in a folder is a ``Conv1D``, as far as transformers knows it."""
    return is_known(folder) and isinstance(dict(skeleton(folder).named_modules()).get(name), Conv1D)


def transposed(source: NativeCheckpoint) -> set[str]:
    """Return the names of linears whose weight the float model stores as ``[in, out]`` (GPT-2's ``Conv1D``)."""
    if not has_class(source):
        return set()
    return {name for name, module in skeleton(source.folder).named_modules() if isinstance(module, Conv1D)}


def conv1d(source: NativeCheckpoint, why: str) -> str | None:
    """Return the reason to refuse ``source`` if a linear is a ``Conv1D``, or ``None``; ``why`` completes the reason."""
    flipped = transposed(source)
    return f"{min(flipped)} is a Conv1D, {why}; export dense instead" if flipped else None


def float_linears(source: NativeCheckpoint) -> list[str]:
    """Return the names of the linears that the checkpoint leaves in floating point, among them the output head."""
    if not has_class(source):  # every matrix: a reader that meets the name of another module passes over it
        names = [name for name in source.float_names() if name.endswith(".weight") and source.tensor(name).dim() == 2]
        return [name.removesuffix(".weight") for name in names]
    return [
        name
        for name, module in skeleton(source.folder).named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in source.specs
    ]


def shared_block_prefix(source: NativeCheckpoint) -> str:
    """Return the prefix that the names of all decoder blocks share, for example ``model.layers.``."""
    first = next(iter(source.specs))
    parts = first.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit())]) + "."


def unpack_bits(words: Tensor, num_bits: int, count: int) -> Tensor:
    """Unpack ``count`` codes of each row of ``words`` int32 ``[rows, w]`` bit by bit, with no code of the packer."""
    rows = []
    for row in words.numpy().astype("<i4"):
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")[: count * num_bits].reshape(count, num_bits)
        rows.append((bits * (1 << np.arange(num_bits))).sum(1))
    return torch.from_numpy(np.stack(rows)).float()
