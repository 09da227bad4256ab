"""Measures the memory of one training step: tensors held, saved by autograd and alive, and memory in use."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight
from qtool.quant.trained_linear import QuantLinear
from qtool.system import memory
from qtool.training import block_training
from qtool.training.fit import _Run

Storage = torch.UntypedStorage
OF_LAYER = {"weights": ("weight", "phi.kept"), "factors": ("a", "b"), "grid": ("scale", "zero_point")}
NOTHING = -1  # the key of no storage
WATCHED = 1  # the zero-based step to measure: the first one whose optimizer has moments


class Live(TorchDispatchMode):
    """Counts the bytes of live tensors, and their peak."""

    def __init__(self, held: Iterable[Storage], device: torch.device) -> None:
        """``held`` are the storages that exist at the start; storages on other devices are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.device = device
        self.known: set[int] = set()
        self.now = self.peak = 0
        for storage in held:
            self._count(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` and count the tensors that it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Storage) -> None:
        if storage.device == self.device and storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


class Saved:
    """Counts the bytes that autograd saves, apart for the weight path of linears, at their peak."""

    def __init__(self, held: Iterable[Storage]) -> None:
        """``held`` are storages that are not counted."""
        self.held: set[int] = set()
        for storage in held:
            self.held.add(storage._cdata)
            weakref.finalize(storage, self.held.discard, storage._cdata)
        self.read: int | None = None  # key of the storage that the running linear reads; None: no linear is running
        self.times: Counter[int] = Counter()  # how often autograd has saved a storage
        self.sizes: dict[int, tuple[str, int]] = {}
        self.now: Counter[str] = Counter()
        self.peak: dict[str, int] = {}

    def keep(self, tensor: Tensor) -> Any:
        """Count ``tensor`` as saved, and return a wrapper whose end tells that autograd has released it."""
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return kept
        self.times[key] += 1
        if self.times[key] == 1:
            kind = "activations" if self.read in (None, key) else "weight path"
            self.sizes[key] = kind, storage.nbytes()
            self.now[kind] += storage.nbytes()
            if self.now.total() > sum(self.peak.values()):
                self.peak = dict(self.now)
        weakref.finalize(kept, self._gone, key)
        return kept

    def _gone(self, key: int) -> None:
        self.times[key] -= 1
        if not self.times[key]:
            kind, nbytes = self.sizes.pop(key)
            self.now[kind] -= nbytes


@dataclass(eq=False)
class _Kept:
    tensor: Tensor


class Watch:
    """Measures the memory of one step of a running training."""

    def __init__(self, loaded: LoadedModel) -> None:
        """``loaded`` is the model to train; any other tensor that is alive now is never counted."""
        self.loaded, self.context = loaded, ExitStack()
        own = {tensor.untyped_storage()._cdata for tensor in (*loaded.model.parameters(), *loaded.model.buffers())}
        self.foreign: set[int] = set()
        for tensor in [each for each in gc.get_objects() if issubclass(type(each), Tensor)]:
            storage = tensor.untyped_storage()
            if storage._cdata not in own | self.foreign:
                self.foreign.add(storage._cdata)
                weakref.finalize(storage, self.foreign.discard, storage._cdata)
        self.held: Counter[str] = Counter()
        self.found: dict[str, Any] = {}

    def fit(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``real``, which is ``fit`` of ``qtool.training.fit``, wrapped to be measured."""

        def watched_fit(
            groups: Any, num_steps: int, loss_of_step: Callable[..., Any], *rest: Any, **others: Any
        ) -> Any:
            on_step, done = others.pop("on_step", None) or (lambda step, figures: None), itertools.count()

            def watched_loss(step: int) -> Any:
                if step == WATCHED:
                    self.begin()
                return loss_of_step(step)

            def watched_step(step: int, figures: dict[str, float]) -> None:
                if step and next(done) == WATCHED:  # step 0 is the validation before the first
                    self.end()
                on_step(step, figures)

            return real(groups, num_steps, watched_loss, *rest, on_step=watched_step, **others)

        return watched_fit

    def begin(self) -> None:
        """Start to measure, between two steps."""
        gc.collect()
        memory.return_freed()
        device = self.loaded.device
        found = {k: v for k, v in everything(self.loaded.model, device).items() if k not in self.foreign}
        self.held = Counter()
        for kind, storage in found.values():
            self.held[kind] += storage.nbytes()
        storages = [storage for _, storage in found.values()]
        self.saved, self.live = Saved(storages), Live(storages, device)

        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.saved.read = args[0].untyped_storage()._cdata

        def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.saved.read = None

        def path_of(layer: QuantLinear) -> Tensor:
            before, self.saved.read = self.saved.read, NOTHING
            try:
                return quantized_weight(layer)
            finally:
                self.saved.read = before

        quantized_weight = QuantLinear.quantized_weight
        self.context.enter_context(mock.patch.object(QuantLinear, "quantized_weight", path_of))
        for module in self.loaded.model.modules():
            if isinstance(module, QuantLinear):
                self.context.callback(module.register_forward_pre_hook(enter).remove)
                self.context.callback(module.register_forward_hook(leave).remove)
        self.context.enter_context(torch.autograd.graph.saved_tensors_hooks(self.saved.keep, lambda kept: kept.tensor))
        self.context.enter_context(self.live)
        forget_peak(device)

    def end(self) -> None:
        """Stop after the step, and store what was found."""
        real = in_use(self.loaded.device, peak=True)
        self.context.close()
        self.found = {"held": dict(self.held), "saved": self.saved.peak, "live": self.live.peak, "real": real}


def everything(model: PreTrainedModel, device: torch.device) -> dict[int, tuple[str, Storage]]:
    """Return every live storage on ``device`` and the kind of its owner, by the storage's key."""
    kinds = (Tensor, nn.Module, torch.optim.Optimizer, QuantizedWeight, _Run, block_training.Norm)
    objects = [each for each in gc.get_objects() if issubclass(type(each), kinds)]  # isinstance would load lazy modules
    head = model.get_output_embeddings()
    parts: list[tuple[str, Iterable[Tensor]]] = []
    for layer in objects:
        if isinstance(layer, QuantLinear) and layer.scale.requires_grad:
            named = dict(layer.named_parameters()) | dict(layer.named_buffers())
            for kind, names in OF_LAYER.items():
                parts.append((kind, [named[name] for name in names if name in named]))
            parts.append(("expanded", [layer.expanded] if isinstance(layer, block_training.BlockLinear) else []))
    for each in objects:
        if isinstance(each, torch.optim.Optimizer):
            parts.append(("optimizer", [value for state in each.state.values() for value in state.values()]))
        elif isinstance(each, QuantizedWeight):
            parts.append(("start", each[:3]))
        elif isinstance(each, _Run):
            parts.append(("best state", each.best))
            parts.append(("starting scales", [size for _, size in each.sizes]))
        elif isinstance(each, block_training.Norm):
            parts.append(("norms", [each.master]))
    parts.append(("float weights", [each.weight for each in objects if type(each) is nn.Linear and each is not head]))
    ends = (model.get_input_embeddings(), head)
    parts.append(("embeddings", [each.get_parameter("weight") for each in ends if each is not None]))
    parts.append(("norms", [*model.parameters(), *model.buffers()]))
    parts.append(("others", [each for each in objects if isinstance(each, Tensor)]))
    found: dict[int, tuple[str, Storage]] = {}
    for kind, tensors in parts:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.device == device:
                found.setdefault(storage._cdata, (kind, storage))
    return found


def forget_peak(device: torch.device) -> None:
    """Reset the peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def in_use(device: torch.device, *, peak: bool) -> int | None:
    """Return the bytes in use now, or at the peak: of CUDA's allocator, or resident memory on Linux, else ``None``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return None
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
