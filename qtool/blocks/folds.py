"""Folds: a scale per input channel of some linears, divided out of the module that makes their input.

For a scale ``s`` per input channel, ``W x = (W diag(s)) (x / s)``. The division is folded into the source of ``x``: a
norm's weight, or the rows of a linear (v before o, up before down). Methods choose ``s`` so that rounding the weights,
or the activations, changes the product less.

No table says which module can absorb a scale: a fold is accepted if scaling its source and its readers leaves the
block's output unchanged. That covers plain norms, norms that multiply by ``1 + weight``, gated and ReLU MLPs, and
leaves out modules that do not commute with a scale, and norms that a linear in floating point reads too.

The folded norm is rounded to its stored dtype first, and the weights are multiplied by the scale that the rounded norm
implies, so storing changes nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtool.blocks.task import BlockTask
from qtool.models.linears import Target, weight_of
from qtool.system import distributed

INVARIANT = 0.01  # a fold is invariant if it changes the output by less than this share of scaling its source alone


@dataclass(frozen=True)
class Fold:
    """A module whose output is divided by ``s`` per channel, and the linears whose columns are multiplied by ``s``."""

    source: nn.Module  # has a weight
    offset: float  # 1 for a norm that multiplies by 1 + weight, else 0
    readers: tuple[Target, ...]
    exact_source: bool  # True if the source stays in floating point: its weight must be a value of the stored dtype

    @torch.no_grad()
    def apply(self, s: Tensor, storage: torch.dtype) -> None:
        """Divide the source by ``s`` ``[channels]`` and multiply the readers' columns.

        A channel whose source would leave the range of ``storage`` is left as it is.
        """
        weight, bias = weight_of(self.source), self._bias
        s = torch.where(self._held(s, storage), s, 1.0)
        if weight.dim() == 1:
            old = weight.float() + self.offset
            weight.copy_((old / s - self.offset).to(storage))
            new = weight.float() + self.offset
            s = torch.where((old != 0) & (new != 0), old / new, s)  # the scale that the rounded norm implies
        else:
            rows = s if isinstance(self.source, Conv1D) else s.unsqueeze(1)
            divided = weight.float() / rows
            weight.copy_(divided.to(storage) if self.exact_source else divided)
        if bias is not None:
            bias.copy_((bias.float() / s).to(storage))
        for reader in self.readers:
            columns = s.unsqueeze(1) if isinstance(reader.linear, Conv1D) else s
            weight_of(reader.linear).mul_(columns)

    @property
    def _bias(self) -> nn.Parameter | None:
        bias = getattr(self.source, "bias", None)
        return bias if isinstance(bias, nn.Parameter) else None

    def _held(self, s: Tensor, storage: torch.dtype) -> Tensor:
        """Return for each channel whether ``storage`` can hold the source divided by ``s``.

        It cannot if a value would be infinite, or if a norm would become zero, which its readers cannot make up for.
        """
        weight, bias = weight_of(self.source).float(), self._bias
        if weight.dim() == 1:
            new = (weight + self.offset) / s
            new = (new - self.offset).to(storage).float() + self.offset
            held = torch.isfinite(new) & ((new != 0) | (weight + self.offset == 0))
        else:
            largest = weight.abs().amax(0 if isinstance(self.source, Conv1D) else 1)
            held = torch.isfinite((largest / s).to(storage))
        return held if bias is None else held & torch.isfinite((bias.float() / s).to(storage))


Found = dict[tuple[str, ...], list[tuple[str, float, tuple[str, ...]]]]


def folds_of(task: BlockTask, probe: Tensor, found: Found) -> list[Fold]:
    """Return the folds of this block; ``found`` keeps them by name for all blocks of one class with equal linears.

    Of several processes the first finds them, on its ``probe``.
    """
    local = {task.local_name(target): target for target in task.targets}
    kind = (type(task.block).__qualname__, *(f"{name} {tuple(t.weight.shape)}" for name, t in local.items()))
    if kind not in found:
        names = {module: name for name, module in task.block.named_modules()}
        found[kind] = distributed.of_first(
            lambda: [
                (names[fold.source], fold.offset, tuple(names[reader.linear] for reader in fold.readers))
                for fold in find_folds(task, probe)
            ]
        )
    return [
        Fold(task.block.get_submodule(source), offset, tuple(local[name] for name in readers), source not in local)
        for source, offset, readers in found[kind]
    ]


def find_folds(task: BlockTask, probe: Tensor) -> list[Fold]:
    """Return the folds of this block that leave its output unchanged, at most one for each group of linears."""
    before = task.forward(probe)
    targets = {target.linear for target in task.targets}
    norms = [
        module
        for module in task.block.modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and weight_of(module).dim() == 1
        and not any(True for _ in module.children())
    ]
    folds = []
    for group in task.groups:
        channels = group[0].weight.shape[1]
        earlier = [t.linear for g in task.groups[: task.groups.index(group)] for t in g]
        candidates = [Fold(norm, offset, tuple(group), True) for norm in norms for offset in (0.0, 1.0)]
        candidates += [Fold(linear, 0.0, tuple(group), linear not in targets) for linear in reversed(earlier)]
        fitting = (fold for fold in candidates if out_channels(fold.source) == channels)
        found = next((fold for fold in fitting if _is_invariant(task, fold, channels, probe, before)), None)
        if found is not None:
            folds.append(found)
    return folds


def out_channels(module: nn.Module) -> int:
    """Return the number of output channels of a linear, or of channels of a norm."""
    weight = weight_of(module)
    return weight.shape[-1] if isinstance(module, Conv1D) else weight.shape[0]


def _is_invariant(task: BlockTask, fold: Fold, channels: int, probe: Tensor, before: Tensor) -> bool:
    """Return whether scaling source and readers keeps the block's output, while scaling the source alone changes it."""
    device = probe.device
    s = torch.exp2(torch.linspace(-1, 1, channels, device=device)[torch.randperm(channels, generator=_generator())])
    touched = [fold.source, *(reader.linear for reader in fold.readers)]
    saved = [(p, p.detach().clone()) for module in touched for p in module.parameters(recurse=False)]
    fold.apply(s, torch.float32)
    both = float((task.forward(probe) - before).norm())
    for parameter, value in saved[len(list(fold.source.parameters(recurse=False))) :]:
        parameter.data.copy_(value)
    alone_source = float((task.forward(probe) - before).norm())
    for parameter, value in saved:
        parameter.data.copy_(value)
    return both < INVARIANT * alone_source


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
