"""What the rounding of a table changes: the rows of embeddings that the text reads, and the inputs of the head.

An embedding is a linear whose input is one-hot, so the second moment of its input is diagonal: the frequencies of the
rows. An estimator that weighs the errors of a linear by the energy of its input channels weighs those of an embedding
row by row.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qtool.blocks.states import BlockStates
from qtool.models.linears import Target, weight_of
from qtool.quant.hessian import gram


class _Lookups(TorchFunctionMode):
    """Counts how often each row of some tables is looked up, and sums the squares of the rows found."""

    def __init__(self, tables: Sequence[nn.Module]) -> None:
        super().__init__()
        self.counts = {weight_of(table): torch.zeros(len(weight_of(table)), dtype=torch.int64) for table in tables}
        self.squares = dict.fromkeys(self.counts, 0.0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.embedding and args[1] in self.counts:
            self.counts[args[1]] += torch.bincount(args[0].flatten().cpu(), minlength=len(args[1]))
            self.squares[args[1]] += _energy(out)
        return out


def _energy(tensor: Tensor) -> float:
    return float(tensor.float().square().sum())


@torch.no_grad()
def row_weights(states: BlockStates, targets: Sequence[Target]) -> dict[str, Tensor]:
    """Return the weights ``[rows]`` of the squared errors of an embedding's rows in its mean squared error per lookup.

    They are the frequencies of the rows in the calibration text, times the square of the factor by which the model's
    class multiplies rows, as Gemma's does. ``states`` are those before any block.
    """
    modules = {target.name: target.linear for target in targets}
    found, outputs = _Lookups(list(modules.values())), dict.fromkeys(modules, 0.0)
    handles = []
    for name, module in modules.items():

        def add(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
            outputs[name] += _energy(out)

        handles.append(module.register_forward_hook(add))
    try:
        with found:
            for _ in states.entering():
                pass
    finally:
        for handle in handles:
            handle.remove()
    weights = {}
    for name, module in modules.items():
        read = found.squares[weight_of(module)]
        weights[name] = frequencies(found.counts[weight_of(module)]) * (outputs[name] / read if read else 1.0)
    return weights


def frequencies(counts: Tensor) -> Tensor:
    """Return the shares ``[rows]`` of rows among all lookups, float32, from the lookups ``[rows]`` of each in a text.

    Rows that the text does not read share as many lookups as it has rows that it reads just once, and at least one:
    the Good-Turing estimate of how often text reads what it has not read before.
    """
    unseen = counts == 0
    if not unseen.any():
        return (counts / counts.sum()).float()
    others = max(int((counts == 1).sum()), 1)
    return (torch.where(unseen, others / unseen.sum(), counts.double()) / (counts.sum() + others)).float()


@torch.no_grad()
def head_hessian(states: BlockStates) -> Tensor:
    """Return ``2/n sum x^T x`` of what the output head reads, ``[d, d]`` float32; ``states`` leave the last block."""
    return gram(batch.flatten(0, -2) for batch in states.of_head()[0])
