"""Going through the blocks of a float model to see what its linears read, with nothing changed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool.blocks.driver import BlockTask, Flow, bring_in
from qtool.models.loading import LoadedModel, Target
from qtool.system import progress


@torch.no_grad()
def walk(loaded: LoadedModel, tokens: Tensor, targets: Sequence[Target]) -> Iterator[BlockTask]:
    """Each block of the float model with what enters it, one block of a streamed model in memory at a time.

    Nothing is quantized or kept, and the model is afterwards what it was.
    """
    flow = Flow(loaded, tokens, list(targets), loaded.dtype, False)
    blocks = loaded.blocks()
    for index, (name, block) in enumerate(progress.track(blocks, "reading blocks", len(blocks))):
        stored = [(tensor, tensor.data) for tensor in (*block.parameters(), *block.buffers())]
        bring_in(block, loaded, loaded.dtype)
        inputs, _, calls, _ = flow.at(index)
        mine = [target for target in targets if target.block == index]
        task = BlockTask(index, name, block, inputs, None, mine, calls, loaded.dtype)
        yield task
        flow.advance(task)
        for tensor, data in stored:
            tensor.data = data


def group_inputs(task: BlockTask) -> Iterator[tuple[list[Target], list[Tensor]]]:
    """Linears of a block that read the same tensor, and what they read, ``[tokens, in]`` for each batch.

    The block is run once. A group's inputs go when the next is asked for, unless the caller holds them.
    """
    read: dict[nn.Module, list[Tensor]] = {group[0].linear: [] for group in task.groups}

    def visit(linear: nn.Module, args: Any, kwargs: Any) -> None:  # Any: the arguments of whatever linear it is
        read[linear].append(args[0].flatten(0, -2))

    task.outputs = task.inputs.like()
    for hidden in task.inputs:
        task.outputs.append(task.observe(read, visit, [hidden])[0])
    for group in task.groups:
        yield group, read.pop(group[0].linear)
