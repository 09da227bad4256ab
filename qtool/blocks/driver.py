"""The block driver: one decoder block after another, each fed by the blocks already quantized.

How the model calls its blocks (masks, rotary tables, anything else, which may differ from block to block) is recorded
from the model's own forward, so no architecture is copied. Which linears share an input, and in what order they run,
is seen by watching one forward of the block.

``BlockTask.stages`` serves methods that quantize a block's linears in that order, each on inputs that already show the
linears before it quantized. Every batch's forward runs once, in a greenlet that pauses where a group of linears is
about to read its input; when the group is packed, all batches go on from there. So a block costs one forward however
many groups it has, where recomputing costs one for each.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool.blocks.calls import Call, first_hidden, record_calls
from qtool.blocks.hidden_states import Stream
from qtool.blocks.task import ERROR_OF, BlockTask, Figures
from qtool.models.linears import Target, packed_linears, replace_linear
from qtool.models.loaded import LoadedModel
from qtool.quant.packed_linear import PackedLinear
from qtool.system import memory, progress, units

TOKENS_PER_BATCH = 2048  # more are no faster on a processor, and need more memory
PROBED_WINDOWS = 4  # that measure a block's error
Series = dict[str, list[float]]


@torch.no_grad()
def run_blocks(
    loaded: LoadedModel,
    tokens: Tensor | None,
    targets: list[Target],
    quantize_block: Callable[[BlockTask], Figures | None],
    *,
    float_stream: bool = False,
    compute: torch.dtype | None = None,
) -> Series:
    """Call ``quantize_block`` for each block in order, and carry its new outputs to the next.

    ``tokens`` ``[n, t]``, or ``None`` for a method that reads no text and gets empty streams. The hidden states between
    blocks have the model's dtype; a block computes in that too, or in ``compute`` for a method that changes float
    weights. The blocks of a streamed model are kept by its run when they are done, and let go here; those that were
    kept before are only passed through.

    Each linear's ``relative_error`` goes to ``loaded.weight_errors``.

    Returns the figures of every block: those that ``quantize_block`` gave, and with tokens ``block_error`` on the first
    windows, ``|q(x) - f(x)|**2 / |f(x)|**2`` with ``f`` the float block and ``x`` the quantized stream.
    """
    blocks = loaded.blocks()
    finished = loaded.streaming.finished if loaded.streaming else None
    kept: list[tuple[dict[str, Tensor], Figures] | None] = []
    for index in range(len(blocks)):  # in order: a block that is done after one that is not was made from other inputs
        kept.append(finished.read(index) if finished and all(kept) else None)
    compute = compute or loaded.dtype
    flow = None if tokens is None or all(kept) else Flow(loaded, tokens, targets, compute, float_stream)
    series: Series = {}
    for index, (name, block) in enumerate(progress.track(blocks, "quantizing blocks", len(blocks))):
        done = kept[index]
        figures = done[1] if done else {}
        if done is None or flow:
            mine = [target for target in targets if target.block == index]
            if finished and index + 1 < len(blocks):
                memory.Pages().read_ahead(blocks[index + 1][1].parameters())
            stored_dtypes = bring_in(block, loaded, compute)
            inputs, float_inputs, calls, pausing = flow.at(index) if flow else (Stream(None), None, {}, True)
            task = BlockTask(
                index, name, block, inputs, float_inputs, mine, calls, compute, pausing, loaded.streaming is not None
            )
            if done is None:
                before = task.forward(inputs[0][:PROBED_WINDOWS]) if flow else None
                figures = (quantize_block(task) or {}) | task.weight_errors
                left = {target.name for target in mine} - {f"{name}.{part}" for part in packed_linears(block)}
                assert not left, f"the method left these as they were: {sorted(left)}"
                if flow and before is not None:
                    flow.advance(task)
                    figures["block_error"] = _relative_error(flow.inputs[0][: len(before)], before)
            elif flow:
                if float_inputs is not None:
                    task.float_outputs = task.through(float_inputs)
                _restore(task, done[0])
                flow.advance(task)
            if not finished:
                _cast_back(block, stored_dtypes)
        if finished:
            if done is None:
                tensors = {f"{name}.{part}": value for part, value in block.state_dict().items()}
                finished.write(index, tensors, figures)
            for part in (block, *(target.linear for target in targets if target.block == index)):
                part.to_empty(device=torch.device("meta"))
            memory.return_freed()
        for key, value in figures.items():
            if key.startswith(ERROR_OF):
                loaded.weight_errors[key.removeprefix(ERROR_OF)] = value
            else:
                series.setdefault(key, []).append(value)
    return series


class Flow:
    """The hidden states on their way through the blocks, and how the model calls each block."""

    def __init__(
        self, loaded: LoadedModel, tokens: Tensor, targets: list[Target], compute: torch.dtype, float_stream: bool
    ) -> None:
        """Bring every batch to the first block, and choose what is held in memory."""
        blocks = loaded.blocks()
        batches = list(tokens.to(loaded.model.device).split(max(1, TOKENS_PER_BATCH // tokens.shape[1])))
        sizes = {n: batches[0][:n] for n in (1, PROBED_WINDOWS)} | {batch.shape[0]: batch for batch in batches}
        self._calls = record_calls(loaded, {len(batch): batch for batch in sizes.values()}, blocks, compute)
        first = first_hidden(loaded, batches[0], blocks)
        stream_bytes = 2 * first[0].nbytes * len(tokens) * (2 if float_stream else 1)  # what enters, and what leaves
        widest = max((target.weight_shape[1] for target in targets), default=0)
        # a paused forward holds what the next linear reads, its residual, and about as much again in callers
        paused_bytes = (widest + 3 * first.shape[-1]) * compute.itemsize * tokens.numel() * (2 if float_stream else 1)
        budget = loaded.streaming.budget if loaded.streaming else None
        on_disk = budget is not None and stream_bytes > budget
        self._pausing = budget is None or stream_bytes + paused_bytes <= budget
        if on_disk:
            progress.note(f"hidden states take {units.size(stream_bytes)}, above data.memory_budget: kept on disk")
        folder = loaded.streaming.finished.folder if loaded.streaming and on_disk else None
        self.inputs = Stream(folder, [first])
        for batch in batches[1:]:
            self.inputs.append(first_hidden(loaded, batch, blocks))
        self.float_inputs = self.inputs if float_stream else None

    def at(self, index: int) -> tuple[Stream, Stream | None, dict[int, Call], bool]:
        """What block ``index`` gets: both streams, its calls by batch size, and whether forwards may be paused."""
        return self.inputs, self.float_inputs, {size: each[index] for size, each in self._calls.items()}, self._pausing

    def advance(self, task: BlockTask) -> None:
        """Go on to what the quantized block made."""
        if self.float_inputs is not None:
            assert task.float_outputs is not None, "a method that asks for the float stream hands its outputs over"
            self.float_inputs = task.float_outputs
        self.inputs = task.outputs or task.through(self.inputs)


def bring_in(block: nn.Module, loaded: LoadedModel, compute: torch.dtype) -> dict[str, torch.dtype]:
    """Bring the tensors of ``block`` that have the model's dtype to ``compute``; returns their dtypes by name.

    What has another dtype keeps it: tables and norms that an architecture holds in float32. A streamed block is copied
    out of its file.
    """
    own = loaded.storage_dtype if loaded.streaming else loaded.dtype
    dtypes, pages = {}, memory.Pages()
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        stored = tensor.data
        if stored.dtype == own and own != compute:
            dtypes[name] = own
        dtype = compute if stored.dtype == own else stored.dtype
        tensor.data = stored.to(loaded.device, dtype, copy=loaded.streaming is not None)
        if loaded.streaming:
            pages.drop(stored)
    return dtypes


def _cast_back(block: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if name in dtypes and tensor.is_floating_point():  # a packed layer has a marker where the weight was
            tensor.data = tensor.data.to(dtypes[name])


def _restore(task: BlockTask, tensors: dict[str, Tensor]) -> None:
    """Make a block what it was when its tensors were kept."""
    for target in task.targets:
        rows, columns = target.weight_shape
        bias = target.linear.bias
        with torch.device(task.inputs[0].device):
            layer = PackedLinear(columns, rows, target.spec, task.compute if isinstance(bias, Tensor) else None)
        replace_linear(task.block, target.name.removeprefix(f"{task.name}."), layer)
    for name, tensor in task.block.state_dict(keep_vars=True).items():
        tensor.data = tensors[f"{task.name}.{name}"].to(tensor)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).square().sum() / expected.float().square().sum())


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
