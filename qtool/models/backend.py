"""The arithmetic of a model's packed linears and head: exact, or by the kernels that this machine has.

* ``exact`` expands a weight for each product; every number that qtool reports was computed with it unless the report
  says otherwise.
* ``fast`` times, for each shape of the model, the dense product and every kernel, and lets each linear compute in the
  fastest way (``qtool/quant/kernel_timing.py``). A dense weight is held where that is faster than all kernels and the
  dense weights together take no more than a part of the free memory. So no kernel is used that is slower than a dense
  product that could be had.
* ``dense``, ``torch``, ``ort`` and ``gemlite`` use what that library has, wherever it takes the weight, without timing.

Kernels multiply inputs of few rows, as in decoding, by a second copy of the weights in the kernel's layout; longer
inputs and gradients take the exact path. ``qtool.quant.kernels`` states how close the two are.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from qtool.config.sections import BackendName
from qtool.models.experts import is_experts
from qtool.models.tables import head_of
from qtool.quant import kernel_timing, kernels
from qtool.quant.kernel_timing import Timing
from qtool.quant.packed_linear import PackedLinear
from qtool.system import memory, progress, units
from qtool.system.errors import InputError

MODES: tuple[str, ...] = get_args(BackendName)
DENSE_SHARE = 4  # dense weights that are held take at most the free memory divided by this


class Choice(NamedTuple):
    """The way in which weights of one shape and grid are multiplied, and its timing."""

    timing: Timing
    name: str

    def __str__(self) -> str:
        return f"{self.timing}; chosen: {self.name}"


@dataclass(frozen=True)
class Backends:
    """The kernels that the packed linears of a model use, and the linears that have none."""

    kernels: Counter[str] = field(default_factory=Counter)  # number of linears, the head too, by their kernel's name
    exact: dict[str, list[str]] = field(default_factory=dict)  # linears on the exact path, by reason
    num_bytes: int = 0  # memory of the kernels' layouts, beside the packed weights
    head: str = ""  # name of the kernel of the output head; empty: it has none, or is not packed
    errors: dict[str, str] = field(default_factory=dict)  # how far from exact, by the kernel's name
    choices: tuple[Choice, ...] = ()  # of ``fast``, one for each shape and grid

    def __str__(self) -> str:
        parts = []
        for name, count in self.kernels.most_common():
            linears = count - (name == self.head)
            served = [f"{linears} linears"] if linears else []
            named = " and ".join([*served, *(["the head"] if name == self.head else [])])
            parts.append(f"{named} by {name}{self._speedup(name)}")
        parts += [
            f"{len(names)} by the exact path ({names[0]}{', ...' if names[1:] else ''}: {reason})"
            for reason, names in self.exact.items()
        ]
        errors = "".join(f"; {name}: {error}" for name, error in self.errors.items())
        held = f"; {units.size(self.num_bytes)} beside the packed weights" if self.num_bytes else ""
        return ", ".join(parts) + errors + held

    def _speedup(self, served_by: str) -> str:
        """Return how the kernel compares with the dense product, over all shapes that it serves, in parentheses."""
        name = served_by.rpartition(" (")[0]
        found = [choice.timing.speedup(name) for choice in self.choices if choice.name == name]
        if not found:
            return ""
        low, high = f"{min(found):.1f}", f"{max(found):.1f}"
        return f" ({low if low == high else f'{low} to {high}'} x dense)"


def check(name: str) -> None:
    """Check that this machine has what the backend ``name``, one of ``MODES``, needs: packages and a device.

    Raises:
        InputError: none of its kernels can be used; the message says why.
    """
    if reason := kernels.missing(name):
        raise InputError(f"backend {name}: {reason}; or use fast, the fastest of what is here")


def use_backend(model: nn.Module, name: str) -> Backends:
    """Let every packed linear of ``model`` compute with the backend ``name``, one of ``MODES``.

    The state dict does not change. A linear without a kernel stays exact and is listed with the reason.

    Raises:
        InputError: ``name`` is unknown, or ``model`` has no packed linears or weights that are not in memory.
    """
    if name not in MODES:
        raise InputError(f"backend {name!r} is not known; use one of {', '.join(MODES)}")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no packed linears; load a folder that qtool wrote")
    for path, layer in layers.items():
        layer.kernels = ()
        if name != "exact" and layer.weight_packed.device.type == "meta":
            raise InputError(f"the weights of {path} are not in memory; load the model without offloading")
    found, head, choosing = Backends(), head_of(model), _Choosing(name)
    errors, by = found.errors, ""
    for path, layer in layers.items():
        owner: Any = model.get_submodule(path.rpartition(".")[0])
        if reason := choosing.serve(layer, owner.num_experts if is_experts(owner) else 1):
            found.exact.setdefault(reason, []).append(path)
            continue
        assert layer.kernel is not None
        backend = layer.kernel.backend
        served_by = f"{backend.name} ({layer.weight_packed.device.type})"
        found.kernels[served_by] += 1
        errors[backend.name] = backend.error
        by = served_by if head is not None and layer is head[1] else by
    return Backends(found.kernels, found.exact, held_bytes(model), by, errors, tuple(choosing.choices.values()))


class _Choosing:
    """Gives layers the kernels of the backend ``name``."""

    def __init__(self, name: str) -> None:
        self.name, self.choices = name, dict[tuple[Any, ...], Choice]()
        self.room: dict[torch.device, int] = {}  # bytes that dense weights may still take

    def serve(self, layer: PackedLinear, experts: int) -> str:
        """Give ``layer`` its kernels; return the reason if it stays exact, else an empty string."""
        if self.name == "exact":
            return "as asked"
        dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.float32
        able = kernel_timing.backends_for(dtype, layer.weight_packed.device, experts)
        if self.name == "fast":
            return self._fastest(layer, experts, dtype, able)
        among = [backend for backend in able if backend.library == self.name]
        if not among:
            device = layer.weight_packed.device
            elsewhere = not any(backend.runs_on(device) for backend in kernels.of_library(self.name))
            what = f"devices of type {device.type}" if elsewhere else "the stacked experts of a layer"
            return f"{self.name} has no kernel for {what}"
        if self.name == kernels.DENSE:
            among.sort(key=lambda backend: backend.dtype != dtype)
        return layer.accelerate(experts, among)

    def _fastest(self, layer: PackedLinear, experts: int, dtype: torch.dtype, able: Sequence[kernels.Backend]) -> str:
        """Give ``layer`` the fastest kernels of the backends ``able``."""
        device, rows = layer.weight_packed.device, layer.out_features // experts
        timing = kernel_timing.timing(layer.spec, rows, layer.in_features, dtype, device)
        room = self.room.setdefault(device, _free_bytes(device) // DENSE_SHARE)
        reasons, needed, by_name = dict(timing.reasons), dict[str, int](), {backend.name: backend for backend in able}
        for backend in able:
            if backend.library == kernels.DENSE:
                needed[backend.name] = layer.out_features * layer.in_features * backend.dtype.itemsize
                if needed[backend.name] > room:
                    reasons[backend.name] = f"{units.size(needed[backend.name])} are too much for the free memory"
        order = kernel_timing.ranked(timing.seconds, by_name.keys() - reasons.keys())
        reason = layer.accelerate(experts, [by_name[name] for name in order])
        chosen = kernel_timing.EXACT if layer.kernel is None else layer.kernel.backend.name
        self.room[device] -= needed.get(chosen, 0)
        choice = Choice(timing, chosen)
        self.choices.setdefault((*timing[:3], dtype, device, chosen), choice)
        if layer.kernel is not None:
            return ""
        none = reason if order else "no way that was tried is faster on this machine"
        return "; ".join([none, *(f"{name}: {why}" for name, why in reasons.items())])


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.free_bytes()


def held_bytes(model: nn.Module) -> int:
    """Return the memory of all kernels' layouts, in bytes, beside the packed weights."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return sum(kernel.num_bytes for layer in layers for kernel in layer.kernels)


@contextmanager
def using(model: nn.Module, name: str) -> Iterator[None]:
    """Compute with the backend ``name`` inside the ``with`` block, and exactly after it.

    A note says how many linears each kernel serves, or that ``model`` has no packed linears.
    """
    if name == "exact":
        yield
        return
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        progress.note(f"backend {name}: {type(model).__name__} has no packed linears, so this changes nothing")
        yield
        return
    progress.note(f"backend {name}: {use_backend(model, name)}")
    try:
        yield
    finally:
        use_backend(model, "exact")
