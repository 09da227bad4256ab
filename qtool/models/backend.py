"""Which arithmetic the packed linears of a model use: ``exact``, or ``fast`` where this machine has a kernel for them.

``exact`` expands a weight for each product and is what every number qtool reports was computed with unless it says
otherwise. ``fast`` serves inputs of few rows, as in decoding, from a second copy of the weights in the kernel's layout;
longer inputs and gradients take the exact path. ``qtool.quant.kernels`` states how close the two are.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from qtool.quant.packed_linear import PackedLinear
from qtool.system import progress, units
from qtool.system.errors import InputError

BACKENDS = ("exact", "fast")


@dataclass(frozen=True)
class Backends:
    """What the packed linears of a model compute with."""

    kernels: Counter[str] = field(default_factory=Counter)  # linears by the name of their kernel
    exact: dict[str, list[str]] = field(default_factory=dict)  # linears that have none, by reason
    num_bytes: int = 0  # memory of the kernels' layouts, beside the packed weights

    def __str__(self) -> str:
        parts = [f"{count} linears by {name}" for name, count in self.kernels.most_common()]
        parts += [
            f"{len(names)} by the exact path ({names[0]}{', ...' if names[1:] else ''}: {reason})"
            for reason, names in self.exact.items()
        ]
        held = f"; {units.size(self.num_bytes)} beside the packed weights" if self.num_bytes else ""
        return ", ".join(parts) + held


def use_backend(model: nn.Module, name: str) -> Backends:
    """Let every packed linear of ``model`` compute by ``fast`` kernels, or ``exact`` again.

    The state dict stays as it is, and whatever has no kernel stays exact and is listed with the reason.

    Raises:
        InputError: an unknown name, a model without packed linears, or one whose weights are not in memory.
    """
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not known; use one of {', '.join(BACKENDS)}")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no packed linears; load a folder that qtool wrote")
    found = Backends()
    for path, layer in layers.items():
        layer.kernel = None
        if name == "exact":
            found.exact.setdefault("as asked", []).append(path)
            continue
        if layer.weight_packed.device.type == "meta":
            raise InputError(f"the weights of {path} are not in memory; load the model without offloading")
        if reason := layer.accelerate():
            found.exact.setdefault(reason, []).append(path)
        else:
            assert layer.kernel is not None
            found.kernels[f"{layer.kernel.backend.name} ({layer.kernel.backend.device})"] += 1
    return Backends(found.kernels, found.exact, held_bytes(model))


def held_bytes(model: nn.Module) -> int:
    """Memory of the kernels' layouts, beside the packed weights."""
    kernels = [module.kernel for module in model.modules() if isinstance(module, PackedLinear)]
    return sum(kernel.num_bytes for kernel in kernels if kernel is not None)


@contextmanager
def using(model: nn.Module, name: str) -> Iterator[None]:
    """Compute with the backend ``name`` inside the ``with`` block, exactly after it; says what serves which linears.

    A model without packed linears has nothing to choose, and that is said too.
    """
    if name == "exact":
        yield
        return
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        progress.note(f"backend {name}: {type(model).__name__} has no packed linears; it computes as it always does")
        yield
        return
    progress.note(f"backend {name}: {use_backend(model, name)}")
    try:
        yield
    finally:
        use_backend(model, "exact")
