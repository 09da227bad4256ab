"""A loaded model: its tokenizer, where it came from, its blocks, and the linears to quantize."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qtool.config.quant import QuantConfig
from qtool.models.kv_cache import with_heads
from qtool.models.linears import (
    Target,
    decoder_blocks,
    linear_bias,
    packed_linears,
    replace_linear,
    shortened,
    stored_weight,
    unmatched,
    weight_of,
)
from qtool.quant.affine import check_weight
from qtool.quant.packed_linear import PARTS, PackedLinear
from qtool.quant.trained_linear import QuantLinear
from qtool.system import memory
from qtool.system.errors import InputError


class FinishedBlocks(Protocol):
    """Where a run keeps the blocks it has done; what is there need not be done again."""

    @property
    def folder(self) -> Path:
        """For what a run must put on disk meanwhile."""

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """Tensors by full name and figures of a block; ``None`` when it is not done yet."""

    def write(self, index: int, tensors: dict[str, Tensor], figures: dict[str, float]) -> None:
        """Keep a block."""


class Streaming(NamedTuple):
    """How a model is worked on that is never whole in memory."""

    finished: FinishedBlocks
    dtype: torch.dtype  # the precision of computation
    device: torch.device  # where the block at work is
    budget: int  # bytes of hidden states and what is between them that may be held in memory


@dataclass
class LoadedModel:
    """A causal language model in evaluation mode, its tokenizer, and where it came from.

    When it is streamed its tensors lie in mapped files, on the CPU and in their stored dtype: ``blocks.run_blocks``
    brings in one block at a time, and lets it go when it is kept elsewhere.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: str  # as the recipe gives it
    folder: Path  # where its files are
    file_dtypes: dict[str, torch.dtype]  # of each floating-point tensor in the files
    streaming: Streaming | None = None
    weight_errors: dict[str, float] = field(default_factory=dict)  # of each linear that the block driver has packed

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype that most tensors are stored in."""
        return most_common(self.file_dtypes)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.streaming.device if self.streaming else self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision the model computes in."""
        return self.streaming.dtype if self.streaming else self.model.dtype

    @property
    def max_length(self) -> int:
        """The longest context in tokens that the model was made for."""
        config = self.model.config.get_text_config()
        length: int = getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 2048
        return length

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Name and module of each decoder block, in order."""
        prefix, blocks = decoder_blocks(self.model)
        return [(f"{prefix}.{i}", block) for i, block in enumerate(blocks)]

    def gather(self, targets: Sequence[Target] = (), *, on_device: bool = True) -> None:
        """Bring the whole of a streamed model into memory, to compute with; blocks that its run has done are packed.

        ``targets`` are the linears that are quantized in those. Without ``on_device`` the model stays on the CPU, for
        who moves it block by block.
        """
        if self.streaming is None:
            return
        blocks = self.blocks()
        done = [self.streaming.finished.read(index) for index in range(len(blocks))]
        if any(done):  # what is left of the model in memory lacks these blocks, and what no file has of them
            self.model = from_files(self.folder, self.storage_dtype)[0].eval().requires_grad_(False)
            for target in targets:
                if done[target.block] is not None:
                    bias = linear_bias(self.model.get_submodule(target.name))
                    rows, columns = target.weight_shape
                    layer = PackedLinear(columns, rows, target.spec, None if bias is None else bias.dtype)
                    replace_linear(self.model, target.name, layer)
            kept = {name: tensor for each in done if each for name, tensor in each[0].items()}
            for name, tensor in self.model.state_dict(keep_vars=True).items():
                if name in kept:
                    tensor.data = kept[name].clone()
        packed = {id(buffer) for layer in packed_linears(self.model).values() for buffer in layer.buffers()}
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            own = tensor.dtype == self.storage_dtype and id(tensor) not in packed
            device = self.device if on_device else torch.device("cpu")
            tensor.data = tensor.data.to(device, self.dtype if own else tensor.dtype)

    def float_copy(self) -> PreTrainedModel:
        """The float model as it is before any linear is replaced: a teacher. It shares all tensors with this one.

        Where linears have been replaced, it is read from its files, to where this one is.
        """
        if any(isinstance(module, PackedLinear | QuantLinear) for module in self.model.modules()):
            model: PreTrainedModel = from_files(self.folder, self.dtype)[0].to(self.model.device).eval()
            model.requires_grad_(False)
            return model
        shared: dict[int, Any] = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}
        teacher: PreTrainedModel = copy.deepcopy(self.model, shared)
        return teacher

    def targets(self, quant: QuantConfig) -> list[Target]:
        """Every linear to quantize, in module order, checked.

        Raises:
            InputError: all faults at once: an override that matches nothing, a group size that does not divide,
                values that are not finite.
        """
        linears = [
            (f"{block_name}.{name}", module, index)
            for index, (block_name, block) in enumerate(self.blocks())
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        ]
        names = [name for name, _, _ in linears]
        faults = list(unmatched(quant, names))
        targets, pages = [], memory.Pages()
        for name, module, index in linears:
            spec = quant.spec_for(name)
            if spec is None:
                continue
            weight = weight_of(module)
            try:
                check_weight(stored_weight(module), spec, f"{name}.weight")
            except InputError as error:
                faults.append(str(error))
            pages.drop(weight)
            targets.append(Target(name, module, spec, index))
        if any(target.spec.kv_cache is not None for target in targets):
            asked = {target.name: target.spec for target in targets}
            specs, wrong = with_heads(asked, {t.name: t.weight_shape[0] for t in targets}, self.model.config)
            targets = [replace(target, spec=specs[target.name]) for target in targets]
            faults += wrong
        if not targets and not faults:
            faults.append("quant.overrides skip every linear; there is nothing to quantize")
        if faults:
            raise InputError("\n  ".join([f"{self.path} cannot be quantized with this recipe:", *shortened(faults)]))
        return targets


def from_files(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:  # Any: of no fixed class
    """The model of ``folder`` on the CPU, and what transformers says about its tensors."""
    loading: Any = AutoModelForCausalLM.from_pretrained(  # a pair, which its annotation does not say
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, info = loading
    return model, info


def most_common(dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """Of all tensors but the scales of packed linears."""
    counted = [
        dtype for name, dtype in dtypes.items() if name.rpartition(".")[2] not in (*PARTS[1:], "scales", "biases")
    ]
    return Counter(counted or dtypes.values()).most_common(1)[0][0]
