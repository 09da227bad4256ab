"""The arithmetic of a model's packed linears and head: ``exact``, or ``fast`` if this machine has a kernel for them.

``exact`` expands a weight for each product; every number that qtool reports was computed with it unless the report says
otherwise. ``fast`` multiplies inputs of few rows, as in decoding, by a second copy of the weights in the kernel's
layout; longer inputs and gradients take the exact path. ``qtool.quant.kernels`` states how close the two are.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qtool.models.experts import is_experts
from qtool.models.tables import head_of
from qtool.quant.packed_linear import PackedLinear
from qtool.system import progress, units
from qtool.system.errors import InputError

MODES = ("exact", "fast")


@dataclass(frozen=True)
class Backends:
    """The kernels that the packed linears of a model use, and the linears that have none."""

    kernels: Counter[str] = field(default_factory=Counter)  # number of linears, the head too, by their kernel's name
    exact: dict[str, list[str]] = field(default_factory=dict)  # linears on the exact path, by reason
    num_bytes: int = 0  # memory of the kernels' layouts, beside the packed weights
    head: str = ""  # name of the kernel of the output head; empty: it has none, or is not packed

    def __str__(self) -> str:
        parts = []
        for name, count in self.kernels.most_common():
            linears = count - (name == self.head)
            served = [f"{linears} linears"] if linears else []
            parts.append(f"{' and '.join([*served, *(['the head'] if name == self.head else [])])} by {name}")
        parts += [
            f"{len(names)} by the exact path ({names[0]}{', ...' if names[1:] else ''}: {reason})"
            for reason, names in self.exact.items()
        ]
        held = f"; {units.size(self.num_bytes)} beside the packed weights" if self.num_bytes else ""
        return ", ".join(parts) + held


def use_backend(model: nn.Module, name: str) -> Backends:
    """Let every packed linear of ``model`` compute with ``fast`` kernels, or ``exact`` again.

    The state dict does not change. A linear without a kernel stays exact and is listed with the reason.

    Raises:
        InputError: ``name`` is unknown, or ``model`` has no packed linears or weights that are not in memory.
    """
    if name not in MODES:
        raise InputError(f"backend {name!r} is not known; use one of {', '.join(MODES)}")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no packed linears; load a folder that qtool wrote")
    found, head, by = Backends(), head_of(model), ""
    for path, layer in layers.items():
        layer.kernels = ()
        if name == "exact":
            found.exact.setdefault("as asked", []).append(path)
            continue
        if layer.weight_packed.device.type == "meta":
            raise InputError(f"the weights of {path} are not in memory; load the model without offloading")
        owner: Any = model.get_submodule(path.rpartition(".")[0])
        if reason := layer.accelerate(owner.num_experts if is_experts(owner) else 1):
            found.exact.setdefault(reason, []).append(path)
        else:
            assert layer.kernel is not None
            backend = layer.kernel.backend
            served_by = f"{backend.name} ({backend.device})"
            found.kernels[served_by] += 1
            by = served_by if head is not None and layer is head[1] else by
    return Backends(found.kernels, found.exact, held_bytes(model), by)


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
