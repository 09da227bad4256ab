"""The model: loading it, walking to its decoder blocks, and saying which linears to quantize and how.

Blocks and linears are found in the module tree: the blocks are the ``ModuleList`` of equal modules that holds the most
parameters, the linears are every ``nn.Linear`` or ``Conv1D`` inside. Nothing is copied from an architecture.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qtool.config.sections import PARTS, ModelConfig, QuantConfig, QuantSpec
from qtool.models.folders import check_files, first_line, read_config, resolve
from qtool.models.kv_cache import with_heads
from qtool.quant.affine import check_weight
from qtool.quant.packed_linear import PackedLinear, QuantLinear
from qtool.system import matmul, memory, progress
from qtool.system.errors import InputError

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Target:
    """A linear to quantize: its full name, the float module, its grid, and the index of its block."""

    name: str
    linear: nn.Module
    spec: QuantSpec
    block: int

    @property
    def weight(self) -> Tensor:
        """Float32 weight ``[out, in]``, a copy where the module stores another dtype or the transpose."""
        return dense_weight(self.linear)

    @property
    def stored_weight(self) -> Tensor:
        """The same in the dtype it has, a view."""
        return stored_weight(self.linear)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(out, in)``, without touching the weight."""
        rows, columns = self.stored_weight.shape
        return rows, columns


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
            self.model = _from_files(self.folder, self.storage_dtype)[0].eval().requires_grad_(False)
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
            model: PreTrainedModel = _from_files(self.folder, self.dtype)[0].to(self.model.device).eval()
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
        faults = list(_unmatched(quant, names))
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
            raise InputError("\n  ".join([f"{self.path} cannot be quantized with this recipe:", *_shortened(faults)]))
        return targets


def _shortened(faults: list[str]) -> Iterator[str]:
    """Each fault, those that differ only in block numbers and counts once, with how many more there are."""
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(re.sub(r"\d+", "0", fault), []).append(fault)
    for same in kinds.values():
        yield same[0] + (f" (and {len(same) - 1} more like it)" if len(same) > 1 else "")


def _unmatched(quant: QuantConfig, names: list[str]) -> Iterator[str]:
    for pattern in quant.overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=1, cutoff=0.0)
            yield f"quant.overrides: no linear matches '{pattern}'; the nearest of {len(names)} names is {near[0]}"


def weight_of(module: nn.Module) -> nn.Parameter:
    """The parameter ``weight`` of a linear or a norm, as it is stored."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def stored_weight(linear: nn.Module) -> Tensor:
    """Weight ``[out, in]`` of an ``nn.Linear`` or a ``Conv1D`` (it stores the transpose) in its own dtype, a view."""
    weight = weight_of(linear).detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def dense_weight(linear: nn.Module) -> Tensor:
    """``stored_weight`` in float32."""
    return stored_weight(linear).float()


def linear_bias(linear: nn.Module) -> Tensor | None:
    """The bias ``[out]`` of a linear, if it has one."""
    bias = linear.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks.

    Raises:
        InputError: when there are none, or when they hold fused experts (3-D parameters).
    """
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(block) for block in module}) == 1
        and any(isinstance(part, nn.Linear | Conv1D | PackedLinear | QuantLinear) for part in module.modules())
    ]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers; it is not supported"
        )
    _, name, blocks = max(lists, key=lambda entry: entry[0])
    fused = [key for key, p in blocks.named_parameters() if p.dim() > 2]
    if fused:
        raise InputError(
            f"{name}.{fused[0]} is a fused {blocks.get_parameter(fused[0]).dim()}-D parameter (mixture of experts); "
            "such models are not supported yet: only linears with 2-D weights are"
        )
    return name, blocks


def replace_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place of the module called ``name``."""
    model.set_submodule(name, layer)


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed linear by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def choose_device(name: str) -> torch.device:
    """The device a recipe names; ``auto`` is the first GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"model.device: {name!r} is no device; use auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"model.device: {name} was asked for, and this torch sees no GPU; use cpu or auto")
    return device


def load_model(
    config: ModelConfig, *, quantized: bool = False, finished: FinishedBlocks | None = None, budget: int = 0
) -> LoadedModel:
    """Load a model for quantization, or, with ``quantized``, any folder for evaluation.

    With ``finished`` it is streamed within ``budget`` bytes, and only checked here: see ``LoadedModel``.

    Raises:
        InputError: missing, damaged, pickled, incomplete, already quantized, with values that are not finite, or
            needing code from the checkpoint.
    """
    device = choose_device(config.device)
    folder = resolve(config.path)
    raw = read_config(folder)
    if not quantized and raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise InputError(f"{config.path} is already quantized ({method}); start from the float model")
    if "auto_map" in raw:
        raise InputError(f"{config.path} needs code from its own folder (auto_map); qtool never runs such code")
    file_dtypes = check_files(folder)
    if not file_dtypes:
        raise InputError(f"{config.path} has no floating-point tensors; it is not a float model")
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        experts = [key for key in EXPERT_COUNTS if getattr(model_config.get_text_config(), key, None)]
        if experts and not quantized:
            raise InputError(f"{config.path} is a mixture of experts ({experts[0]} is set); that is not supported yet")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        storage = most_common(file_dtypes)
        dtype = compute_dtype(config.dtype, storage, device)
        matmul.choose_library(dtype)
        model, info = _from_files(folder, storage if finished else dtype)
    except InputError:
        raise
    except Exception as error:  # whatever transformers finds wrong with a folder, the folder is what is wrong
        found = (folder / "tokenizer.json").exists() or any(folder.glob("*.model")) or (folder / "vocab.json").exists()
        hint = "" if found else " (the folder has no tokenizer.json)"
        raise InputError(f"{config.path} cannot be loaded: {first_line(error).rstrip(':')}{hint}") from error
    _check_complete(config.path, info)
    if not quantized:
        _check_finite(model)
    model.eval().requires_grad_(False)
    if finished is None:
        return LoadedModel(model.to(device), tokenizer, config.path, folder, file_dtypes)
    streaming = Streaming(finished, dtype, device, budget)
    return LoadedModel(model, tokenizer, config.path, folder, file_dtypes, streaming)


def _from_files(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:  # Any: of no fixed class
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


def _check_finite(model: nn.Module) -> None:
    pages = memory.Pages()
    for name, parameter in model.named_parameters():
        low, high = parameter.aminmax()
        pages.drop(parameter)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            found = int((~torch.isfinite(parameter)).sum())
            raise InputError(
                f"{name} holds {found} NaN or infinite value(s) of {parameter.numel()}; repair the checkpoint"
            )


def most_common(dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """Of all tensors but the scales of packed linears."""
    counted = [
        dtype for name, dtype in dtypes.items() if name.rpartition(".")[2] not in (*PARTS[1:], "scales", "biases")
    ]
    return Counter(counted or dtypes.values()).most_common(1)[0][0]


def compute_dtype(name: str, storage: torch.dtype, device: torch.device) -> torch.dtype:
    """``auto`` is the checkpoint's own where the device multiplies it natively, else float32, which holds it."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cpu":
        return storage
    able = torch.cpu.get_capabilities()
    native = storage == torch.bfloat16 and (able.get("avx512_bf16") or able.get("amx_bf16"))
    return storage if native else torch.float32


def _check_complete(path: str, info: dict[str, Any]) -> None:
    """transformers fills what is missing with random numbers and drops what it does not know; we say so."""
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise InputError(
            f"{path}: {name} has shape {list(found)} in the file, and the config asks for {list(expected)}"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"{path} lacks {len(missing)} tensor(s) that its config asks for, the first is {missing[0]}")
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        progress.note(f"{path}: {len(unused)} tensor(s) in the files are not used by its config, e.g. {unused[0]}")
