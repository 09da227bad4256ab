"""The stages of a block: each group of its linears, on inputs that already show the groups before it quantized.

A method such as GPTQ quantizes the linears of a block group by group (q, k, v; o; gate, up; down), in the order in
which the block runs them. To run the block again for every group would cost one forward for each. ``paused_stages``
runs it once: the forward of every batch is a greenlet, which pauses where a group is about to read its input, and goes
on when the method has packed the group. Time runs downwards::

    method                    batch 0                  batch 1
      | switch(hidden) ---------> runs to q_proj
      | <--- input of q, k, v --- pauses
      | switch(hidden) ----------------------------------> runs to q_proj
      | <--- input of q, k, v ---------------------------- pauses
      | quantizes q, k, v on the inputs of all batches, packs them
      | switch() ---------------> runs the packed q, k, v
      | <--- input of o --------- pauses before o_proj
      | switch() ----------------------------------------> runs the packed q, k, v
      | <--- input of o ---------------------------------- pauses before o_proj
      | ...
      | switch() ---------------> runs to its end
      | <--- output ------------- ends

Only the method's greenlet chooses who runs next; a paused forward switches back to it and to no other. To pause, the
``forward`` of each float linear is replaced on the instance, and restored when the stages end, also by an error.

Of several processes each runs the forwards of its own batches, in the same stages. What needs the other processes is
done by the method between the stages, and never in a paused forward.

Paused forwards of all batches need memory. Where there is not enough, ``repeated_stages`` runs the block again for each
group instead, with the same result bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from qtool.blocks.hidden_states import HiddenStates
from qtool.blocks.task import BlockTask, Rows, rows_of
from qtool.models.block_calls import Stop
from qtool.models.linears import Target
from qtool.quant.activations import round_input
from qtool.quant.expert_product import product
from qtool.quant.packed_linear import PackedLinear
from qtool.system import memory


class Stage(NamedTuple):
    """A group of linears that read the same tensor and round it alike, and that input for each batch."""

    targets: list[Target]
    inputs: Iterable[Rows]  # as the packed linears read them, rounded; may be computed again by each iteration
    float_inputs: Iterable[Rows] | None  # inputs in the float model, for methods that ask for them: not rounded


def stages(task: BlockTask) -> Iterator[Stage]:
    """Yield each group of linears in the order they run; the caller packs a group before it asks for the next.

    All batches go through the block together, and pause at each group, if memory allows that.
    """
    return paused_stages(task) if task.pausing else repeated_stages(task)


def paused_stages(task: BlockTask) -> Iterator[Stage]:
    """Yield the stages of a block, with every batch's forward paused between them; sets the outputs of ``task``."""
    groups = task.rounded_groups
    runs = [greenlet(task.forward) for _ in task.inputs]
    float_runs = [greenlet(task.forward) for _ in task.float_inputs or ()]
    with _pausing(task, {group[0].linear for group in groups}, set(float_runs)):
        inputs = [run.switch(hidden) for run, hidden in zip(runs, task.inputs, strict=True)]
        float_inputs = [run.switch(hidden) for run, hidden in zip(float_runs, task.float_inputs or (), strict=True)]
        for group in groups:
            task.count_tokens(group[0], (rows.counts for rows in inputs))
            yield Stage(group, inputs, float_inputs if task.float_inputs is not None else None)
            if task.streamed and task.float_inputs is None:
                for target in group:
                    target.linear.to_empty(device=torch.device("meta"))
            memory.return_freed()
            _expand(task, group)
            del inputs[:], float_inputs[:]  # the method is done with them: free each as its batch goes on
            for run in runs:
                inputs.append(run.switch())
            with task.unpacked():  # float runs find float linears, whatever has been packed
                for run in float_runs:
                    float_inputs.append(run.switch())
            _contract(task, group)
            memory.return_freed()
        share = task.inputs.share
        task.outputs = HiddenStates(None, inputs, share)
        task.float_outputs = HiddenStates(None, float_inputs, share) if task.float_inputs is not None else None


@contextmanager
def _pausing(task: BlockTask, leaders: set[nn.Module], float_runs: set[greenlet]) -> Iterator[None]:
    """Let each forward of the block pause before the linears ``leaders``, the first of each group, read their input."""
    for target in task.targets:
        target.linear.forward = _paused_forward(task, target, target.linear in leaders, float_runs)
    try:
        yield
    finally:
        for target in task.targets:
            del target.linear.forward
        _contract(task, task.targets)


def _paused_forward(task: BlockTask, target: Target, leads: bool, float_runs: set[greenlet]) -> Callable[..., Tensor]:
    """Return the forward of a float linear that pauses first if it ``leads`` its group.

    A forward that paused here may find the linear packed when it goes on, and then runs the packed layer; a float run
    always runs the float linear.
    """
    linear, forward, name = target.linear, target.linear.forward, task.local_name(target)
    paused: set[greenlet] = set()

    def paused_forward(x: Tensor, *counts: list[int]) -> Tensor:
        run = getcurrent()
        if leads and run not in paused:  # a block may call it again
            paused.add(run)
            assert run.parent is not None
            read = x if run in float_runs else round_input(x, target.spec)
            run.parent.switch(rows_of((read, *counts)))
        layer = linear if run in float_runs else task.block.get_submodule(name)
        result: Tensor = forward(x, *counts) if layer is linear else layer(x, *counts)
        return result

    return paused_forward


def _expand(task: BlockTask, group: list[Target]) -> None:
    """Let the packed layers of ``group`` expand their weight once, instead of once for each batch; same bits."""
    for target in group:
        layer = task.block.get_submodule(task.local_name(target))
        if isinstance(layer, PackedLinear):
            dense = layer.dequantized(task.compute)
            layer.forward = partial(_multiplied, dense, layer.bias)  # type: ignore[method-assign]


def _multiplied(weight: Tensor, bias: Tensor | None, x: Tensor, counts: list[int] | None = None) -> Tensor:
    return product(x, weight, bias, counts)


def _contract(task: BlockTask, group: list[Target]) -> None:
    """Drop the expanded weights of ``group``."""
    for target in group:
        vars(task.block.get_submodule(task.local_name(target))).pop("forward", None)


def repeated_stages(task: BlockTask) -> Iterator[Stage]:
    """Yield the stages of a block, and run it again for each; sets the float outputs of ``task``."""
    for group in task.rounded_groups:
        read = partial(_Inputs, task, group[0])
        yield Stage(group, read(task.inputs), read(task.float_inputs, True) if task.float_inputs else None)
    if task.float_inputs is not None:
        with task.unpacked():
            task.float_outputs = task.through(task.float_inputs)


@dataclass
class _Inputs:
    """The inputs of a linear, one for each batch, computed again by each iteration."""

    task: BlockTask
    target: Target
    states: HiddenStates
    unpacked: bool = False

    def __iter__(self) -> Iterator[Rows]:
        return map(self._read, self.states)

    def _read(self, hidden: Tensor) -> Rows:
        found: list[Rows] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if self.unpacked else round_input(args[0], self.target.spec)
            found.append(rows_of((x, *args[1:])))
            raise Stop

        with self.task.unpacked() if self.unpacked else nullcontext(), suppress(Stop):
            self.task.observe([self.target.linear], stop, [hidden])
        return found[0]
