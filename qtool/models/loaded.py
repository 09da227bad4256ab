"""A loaded model: the transformers model with its tokenizer, its folder, its dtypes and its decoder blocks.

A model is loaded in one of two ways. Normally its weights are in memory, on the device and in the dtype that compute. A
streamed model (``LoadedModel.streaming``) may be larger than memory: its weights stay in mapped files, in the dtype of
the files, until the block driver brings a block in, or ``gather`` brings in the whole model.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from qtool.models import expert_files, experts
from qtool.models.auto_class import auto_class
from qtool.models.config_values import config_value
from qtool.models.linears import Target, decoder_blocks, linear_bias, packed_weights, replace_linear, weight_of
from qtool.quant.packed_embedding import PackedEmbedding, TiedLinear
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.packed_weight import PARTS, PackedWeight
from qtool.quant.trained_linear import QuantLinear


class Streaming(NamedTuple):
    """The dtype and the device that compute, for a model whose weights are in mapped files."""

    dtype: torch.dtype
    device: torch.device  # the device of the block that is being quantized


@dataclass
class LoadedModel:
    """A causal language model in evaluation mode, its tokenizer, and its folder.

    The tensors of a streamed model are on the CPU, in mapped files: ``blocks.driver.run_blocks`` brings in one block at
    a time, and frees it when it is kept elsewhere.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: str  # the name of the model in the recipe
    folder: Path  # the folder of its files
    file_dtypes: dict[str, torch.dtype]  # dtype of each floating-point tensor in the files
    streaming: Streaming | None = None
    extremes: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)
    """Lowest and highest value of each parameter, found when values were checked; empty: they were not."""
    odd_linears: dict[str, str] | None = field(default=None, repr=False)
    """Linears that a packed layer cannot stand for, with the reason (``uncalled.py``); ``None``: not looked for yet."""
    notes: list[str] = field(default_factory=list, repr=False)
    """Lines about weights that stay in floating point, which were shown already."""
    pristine: PreTrainedModel | None = field(default=None, repr=False)
    """The float model as it was, of a model that has no files to be read from again."""

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of most tensors in the files."""
        return most_common(self.file_dtypes)

    @property
    def num_weights(self) -> int:
        """The number of weights of a float model; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_bytes(self) -> int:
        """The bytes of the weights of a float model in the dtype of its files, without headers."""
        return self.num_weights * self.storage_dtype.itemsize

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.streaming.device if self.streaming else self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation."""
        return self.streaming.dtype if self.streaming else self.model.dtype

    @property
    def max_length(self) -> int:
        """The model's context length in tokens."""
        config = self.model.config.get_text_config()
        given = (config_value(config, name) for name in ("max_position_embeddings", "n_positions"))
        return next((length for length in given if isinstance(length, int) and length > 0), 2048)

    @property
    def num_embeddings(self) -> int:
        """The rows of the embedding table: the model can read the tokens from 0 to one less."""
        table: Any = self.model.get_input_embeddings()
        return int(table.num_embeddings if isinstance(table, nn.Embedding) else weight_of(table).shape[0])

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Return the name and the module of each decoder block, in order."""
        prefix, blocks = decoder_blocks(self.model)
        return [(f"{prefix}.{i}", block) for i, block in enumerate(blocks)]

    def gather(
        self,
        done: Sequence[Mapping[str, Tensor] | None] = (),
        targets: Sequence[Target] = (),
        *,
        on_device: bool = True,
    ) -> None:
        """Bring the whole of a streamed model into memory, in the dtype that computes.

        ``done`` has the state dict of each finished block, and ``None`` for the others; the ``targets`` of finished
        blocks become packed linears. Without ``on_device`` the model stays on the CPU, for a caller that moves it to
        the device block by block.
        """
        if self.streaming is None:
            return
        if any(done):  # the driver has freed these blocks, with the buffers that are in no file
            tables = {n: m for n, m in self.model.named_modules() if isinstance(m, PackedEmbedding | TiedLinear)}
            self.model = from_files(self.folder, self.storage_dtype, streamed=True)[0].eval().requires_grad_(False)
            for name, table in tables.items():
                self.model.set_submodule(name, table)
            for target in targets:
                if done[target.block] is not None:
                    bias = linear_bias(self.model.get_submodule(target.name))
                    rows, columns = target.weight_shape
                    layer = PackedLinear(columns, rows, target.spec, None if bias is None else bias.dtype)
                    replace_linear(self.model, target.name, layer)
        device = self.device if on_device else torch.device("cpu")
        expert_files.bring_in(self.model, device, lambda dtype: self.dtype if dtype == self.storage_dtype else dtype)
        kept = {name: tensor for each in done if each for name, tensor in each.items()}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name in kept:
                tensor.data = kept[name].clone()
        weights = packed_weights(self.model).values()
        packed = {id(buffer) for weight in weights for buffer in weight.buffers()}
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            own = tensor.dtype == self.storage_dtype and id(tensor) not in packed
            tensor.data = tensor.data.to(device, self.dtype if own else tensor.dtype)
        for weight in weights:
            weight.mark(self.dtype)

    def float_copy(self) -> PreTrainedModel:
        """The float model as it is before any linear is replaced: a teacher. It shares all tensors with this one.

        If linears were replaced, return ``pristine``, or else read the model from its files again, on the same device.
        """
        if any(isinstance(module, PackedWeight | QuantLinear) for module in self.model.modules()):
            if self.pristine is not None:
                return self.pristine
            model: PreTrainedModel = from_files(self.folder, self.dtype)[0].to(self.model.device).eval()
            model.requires_grad_(False)
            return model
        shared: dict[int, Any] = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}
        teacher: PreTrainedModel = copy.deepcopy(self.model, shared)
        return teacher


def from_files(
    folder: Path, dtype: torch.dtype, *, streamed: bool = False
) -> tuple[Any, dict[str, Any]]:  # Any: models have no common class
    """Return the model of ``folder`` on the CPU, and transformers' loading info: missing and unexpected tensors.

    With ``streamed``, tensors stay in mapped files, and experts that would be stacked in memory in their own
    (``expert_files.py``).
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind: Any = auto_class(config)
    if streamed:
        with torch.device("meta"):
            skeleton = kind.from_config(config, trust_remote_code=False)
        kind = expert_files.without_experts(skeleton, folder)
    model, info = kind.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if streamed:
        expert_files.attach(model, type(skeleton), dtype)
    experts.unfuse(model)
    for part in (model.config, model.config.get_text_config()):
        vars(part).pop("auto_map", None)  # names code of the folder, which was not used
    return model, info


def most_common(dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """Return the most common dtype of all tensors but the scales of packed linears."""
    counted = [
        dtype for name, dtype in dtypes.items() if name.rpartition(".")[2] not in (*PARTS[1:], "scales", "biases")
    ]
    return Counter(counted or dtypes.values()).most_common(1)[0][0]
