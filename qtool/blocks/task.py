"""The task that a method gets for each decoder block: its linears, what the block reads, and how to pack a linear.

A method may run the block (``forward``, ``through``), ask which linears read the same tensor (``groups``), watch what
they read (``observe``), or take them group by group, each on inputs that show the groups before it quantized
(``stages.stages``). It ends by packing every target. What float linears read is not rounded, also where a grid rounds
the inputs of its linear (``quant/activations.py``); a stage has them rounded as the packed linear will read them.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtool.blocks.calls import BlockCall
from qtool.blocks.ending import Ending
from qtool.blocks.hidden_states import HiddenStates
from qtool.models.experts import num_experts
from qtool.models.linears import Target, replace_linear
from qtool.quant.affine import QuantizedWeight, relative_error
from qtool.quant.packed_linear import PackedLinear
from qtool.system import distributed
from qtool.system.errors import InputError


class Rows(NamedTuple):
    """The input of a linear for one batch: ``x [tokens, in]`` and, of experts, the number of rows of each expert."""

    x: Tensor
    counts: list[int] | None = None


def rows_of(args: tuple[Any, ...]) -> Rows:
    """Return the input of a linear from the arguments of its call."""
    return Rows(args[0].flatten(0, -2), *args[1:])


@dataclass
class BlockTask:
    """One block, its inputs, and the linears to quantize in it."""

    index: int
    name: str
    block: nn.Module
    inputs: HiddenStates  # batches [b, t, d] from the quantized blocks before this one
    float_inputs: HiddenStates | None  # batches from the float model, for methods that ask for them
    targets: list[Target]
    calls: dict[int, BlockCall]  # recorded call for each batch size, always including 1
    compute: torch.dtype  # dtype of the block while the method has it
    pausing: bool = True  # True if memory allows every batch's forward to pause in the middle of the block
    ending: Ending | None = None  # final norm and head of the model; ``None`` if the task has no hidden states
    is_last: bool = False  # True of the last decoder block
    is_head: bool = False  # True of the output head, whose inputs share only their second moment with a text's
    streamed: bool = False  # True if float weights may be freed as soon as they are packed
    outputs: HiddenStates | None = None  # hidden states after the quantized block; ``None``: the driver makes them
    float_outputs: HiddenStates | None = None  # hidden states after the float block
    weight_errors: dict[str, float] = field(default_factory=dict)  # relative error of each packed linear, by name
    expert_tokens: dict[str, Tensor] = field(default_factory=dict)  # [experts] tokens that each saw, by their module
    _reading: list[tuple[tuple[Any, ...], Target]] = field(default_factory=list)  # in the order of calls, by tensor

    def __post_init__(self) -> None:
        """Hold the float linears, which methods and float forwards need until the block is done."""
        self.floats = [target.linear for target in self.targets]

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the block in its present state: hidden states ``[b, t, d]`` in and out."""
        return self.calls[hidden.shape[0]].run(self.block, hidden, self.compute)

    def through(self, states: HiddenStates) -> HiddenStates:
        """Run ``states`` through the block in its present state; outputs are kept where ``states`` are."""
        outputs = states.like()
        for hidden in states:
            outputs.append(self.forward(hidden))
        return outputs

    @property
    def groups(self) -> list[list[Target]]:
        """The targets in the order they run, those that read the same tensor together (q, k, v; gate, up).

        Found by watching one forward of the block. A linear that is called twice is in its first group.
        """
        return self._grouped(lambda target: None)

    @property
    def rounded_groups(self) -> list[list[Target]]:
        """The groups, where linears that round the same tensor differently are in groups of their own."""
        return self._grouped(lambda target: target.spec.activations)

    def _grouped(self, apart: Callable[[Target], Hashable]) -> list[list[Target]]:
        """Return the targets that read the same tensor together, if ``apart`` says the same of them."""
        if not self._reading:
            self._reading = self._watched()
        found: dict[tuple[Any, ...], list[Target]] = {}
        for tensor, target in self._reading:
            found.setdefault((tensor, apart(target)), []).append(target)
        return list(found.values())

    def _watched(self) -> list[tuple[tuple[Any, ...], Target]]:
        """Run the block on one window; return what identifies the tensor that each target reads, in order of calls."""
        seen: dict[nn.Module, tuple[Any, ...]] = {}
        kept: list[Tensor] = []  # holds the tensors, so that no address is used twice
        by_module = {target.linear: target for target in self.targets}

        def visit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0]
            kept.append(x)
            seen.setdefault(module, (x.data_ptr(), x.shape, x.stride()))

        self.observe(by_module, visit, [self.inputs[0][:1]])
        unused = {target.name for target in self.targets} - {by_module[module].name for module in seen}
        if unused:
            raise InputError(
                f"{min(unused)} is not called by its block ({len(unused)} such linear(s)), so nothing shows what "
                "it reads; leave it in floating point by quant.overrides: {NAME: {skip: true}}"
            )
        return [(tensor, by_module[module]) for module, tensor in seen.items()]

    @torch.no_grad()
    def observe(
        self,
        modules: Iterable[nn.Module],
        visit: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
        inputs: Iterable[Tensor],
    ) -> list[Tensor]:
        """Run the block on ``inputs`` and return its outputs; ``visit`` gets each module's arguments before it runs."""
        hooks = [module.register_forward_pre_hook(visit, with_kwargs=True) for module in modules]
        try:
            return [self.forward(hidden) for hidden in inputs]
        finally:
            for hook in hooks:
                hook.remove()

    def count_tokens(self, target: Target, counts: Iterable[list[int] | None]) -> None:
        """Add up ``counts``, the rows that each expert of ``target`` gets of a batch, unless another linear did."""
        owner = target.name.rpartition(".")[0]
        if num_experts(target.linear) > 1 and owner not in self.expert_tokens:
            self.expert_tokens[owner] = torch.tensor(list(counts)).sum(0)

    def through_counted(self, states: HiddenStates) -> HiddenStates:
        """Do what ``through`` does, and count the tokens that experts see."""
        seen: dict[nn.Module, list[list[int]]] = {}
        experts = [t for t in self.targets if num_experts(t.linear) > 1]
        layers = {self.block.get_submodule(self.local_name(target)): target for target in experts}
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: seen.setdefault(module, []).append(args[1]))
            for layer in layers
        ]
        try:
            outputs = self.through(states)
        finally:
            for hook in hooks:
                hook.remove()
        for layer, target in layers.items():
            self.count_tokens(target, seen.get(layer, []))
        return outputs

    def pass_floats(self, leaders: Iterable[nn.Module] = ()) -> dict[nn.Module, Tensor]:
        """Set ``float_outputs`` to what the block in its present state makes of ``float_inputs``.

        Return the sum of squares ``[in]`` of each channel that each of ``leaders`` reads meanwhile, in all processes.
        """
        assert self.float_inputs is not None
        squares: dict[nn.Module, Tensor] = {}

        def visit(linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0].flatten(0, -2).float()
            squares[linear] = squares.get(linear, 0) + x.square().sum(0)

        leaders, outputs = list(leaders), self.float_inputs.like()
        for hidden in self.float_inputs:
            outputs.append(self.observe(leaders, visit, [hidden])[0])
        self.float_outputs = outputs
        distributed.sum_all([squares[linear] for linear in leaders])
        return squares

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Put the float linears back in their places inside the ``with`` block."""
        packed = {target: self.block.get_submodule(self.local_name(target)) for target in self.targets}
        for target in packed:
            replace_linear(self.block, self.local_name(target), target.linear)
        try:
            yield
        finally:
            for target, layer in packed.items():
                replace_linear(self.block, self.local_name(target), layer)

    def pack(self, target: Target, weight: QuantizedWeight) -> None:
        """Replace the float linear of ``target`` by a packed layer that holds ``weight``."""
        self.weight_errors[target.name] = relative_error(target.stored_weight, weight)
        bias = target.linear.bias
        layer = PackedLinear.from_quantized(weight, bias if isinstance(bias, Tensor) else None)
        replace_linear(self.block, self.local_name(target), layer)
        layer.mark(target.stored_weight.dtype)  # a method may have put a layer of another dtype there

    def local_name(self, target: Target) -> str:
        """Return the name of a target within its block."""
        return target.name.removeprefix(self.full_name(""))

    def full_name(self, part: str) -> str:
        """Return the name in the model of the part of the block that is called ``part`` there."""
        return f"{self.name}.{part}" if self.name else part
