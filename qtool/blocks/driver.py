"""The block driver: one decoder block after another, each fed by the blocks already quantized.

How the model calls its blocks (masks, rotary tables, anything else, which may differ from block to block) is recorded
from the model's own forward, so no architecture is copied. Which linears share an input, and in what order they run,
is seen by watching one forward of the block.

``BlockTask.stages`` serves methods that quantize a block's linears in that order, each on inputs that already show the
linears before it quantized. Every batch's forward runs once, in a greenlet that pauses where a group of linears is
about to read its input; when the group is packed, all batches go on from there. So a block costs one forward however
many groups it has, where recomputing costs one for each.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qtool.blocks.calls import BlockCall, first_hidden, record_calls
from qtool.blocks.hidden_states import HiddenStates
from qtool.blocks.job import Figures, FinishedBlock, Job, Result, Workspace, block_series
from qtool.blocks.task import BlockTask
from qtool.models.linears import Target, packed_linears, replace_linear
from qtool.models.loaded import LoadedModel
from qtool.quant.packed_linear import PackedLinear
from qtool.system import memory, progress, units

TOKENS_PER_BATCH = 2048  # more are no faster on a processor, and need more memory
PROBED_WINDOWS = 4  # that measure a block's error


@torch.no_grad()
def run_blocks(
    job: Job,
    quantize_block: Callable[[BlockTask], Figures | None],
    *,
    float_stream: bool = False,
    compute: torch.dtype | None = None,
) -> Result:
    """Call ``quantize_block`` for each block in order, and carry its new outputs to the next.

    A method that reads no text gets empty streams. The hidden states between blocks have the model's dtype; a block
    computes in that too, or in ``compute`` for a method that changes float weights. With a workspace each block is kept
    there when it is done, and freed here; those that were kept before are only passed through.

    The result has the figures of every block: those that ``quantize_block`` gave, and with text ``block_error`` on the
    first windows, ``|q(x) - f(x)|**2 / |f(x)|**2`` with ``f`` the float block and ``x`` the quantized stream.
    """
    loaded, workspace = job.loaded, job.workspace
    assert loaded.streaming is None or workspace is not None, "a streamed model needs somewhere to keep its blocks"
    blocks = loaded.blocks()
    kept = _kept(workspace, len(blocks))
    compute = compute or loaded.dtype
    flow = None if job.tokens is None or all(kept) else BlockStates(job, compute, float_stream)
    figures: list[Figures] = []
    weight_errors: dict[str, float] = {}
    for index, (name, block) in enumerate(progress.track(blocks, "quantizing blocks", len(blocks))):
        done = kept[index]
        if done is None or flow:
            if workspace and index + 1 < len(blocks):
                memory.Pages().read_ahead(blocks[index + 1][1].parameters())
            stored_dtypes = bring_in(block, loaded, compute)
            task = _task(job, index, name, block, flow, compute)
            if done is None:
                done = _quantize(task, quantize_block, flow)
                if workspace:
                    workspace.write(index, done)
            elif flow:
                _pass_through(task, done, flow)
            if workspace is None:
                _cast_back(block, stored_dtypes)
            else:
                _free(task.floats)
        if workspace:
            _free([block])
        figures.append(done.figures)
        weight_errors |= done.weight_errors
    return Result(block_series(figures), weight_errors)


def _kept(workspace: Workspace | None, num_blocks: int) -> list[FinishedBlock | None]:
    """The blocks of an earlier start; one that is done after one that is not was made from other inputs."""
    kept: list[FinishedBlock | None] = []
    for index in range(num_blocks):
        kept.append(workspace.read(index) if workspace and all(kept) else None)
    return kept


def _task(
    job: Job, index: int, name: str, block: nn.Module, flow: "BlockStates | None", compute: torch.dtype
) -> BlockTask:
    """The task of one block, which holds its float linears."""
    inputs, float_inputs, calls, pausing = flow.at(index) if flow else (HiddenStates(None), None, {}, True)
    streamed = job.loaded.streaming is not None
    return BlockTask(index, name, block, inputs, float_inputs, job.of_block(index), calls, compute, pausing, streamed)


def _quantize(
    task: BlockTask, quantize_block: Callable[[BlockTask], Figures | None], flow: "BlockStates | None"
) -> FinishedBlock:
    """Let the method quantize a block, and carry its outputs on."""
    before = task.forward(task.inputs[0][:PROBED_WINDOWS]) if flow else None
    figures = dict(quantize_block(task) or {})
    left = {target.name for target in task.targets} - {f"{task.name}.{part}" for part in packed_linears(task.block)}
    assert not left, f"the method left these as they were: {sorted(left)}"
    if flow and before is not None:
        flow.advance(task)
        figures["block_error"] = relative_change(flow.inputs[0][: len(before)], before)
    tensors = {f"{task.name}.{part}": value for part, value in task.block.state_dict().items()}
    return FinishedBlock(tensors, figures, task.weight_errors)


def _pass_through(task: BlockTask, done: FinishedBlock, flow: "BlockStates") -> None:
    """Carry the hidden states through a block that an earlier start has finished."""
    if task.float_inputs is not None:
        task.float_outputs = task.through(task.float_inputs)
    _restore(task, done.tensors)
    flow.advance(task)


def _free(modules: Iterable[nn.Module]) -> None:
    """Let go of the tensors of ``modules``, which lie elsewhere."""
    for module in modules:
        module.to_empty(device=torch.device("meta"))
    memory.return_freed()


def gather(job: Job, *, on_device: bool = True) -> None:
    """Bring the whole model of a job into memory, with the blocks that its workspace keeps in their places."""
    workspace = job.workspace
    finished = [workspace.read(index) for index in range(len(job.loaded.blocks()))] if workspace else []
    job.loaded.gather([each and each.tensors for each in finished], job.targets, on_device=on_device)


class BlockStates:
    """The hidden states on their way through the blocks, and how the model calls each block."""

    def __init__(self, job: Job, compute: torch.dtype, float_stream: bool) -> None:
        """Bring every batch to the first block, and choose what is held in memory."""
        loaded, tokens, workspace = job.loaded, job.text, job.workspace
        blocks = loaded.blocks()
        batches = list(tokens.to(loaded.model.device).split(max(1, TOKENS_PER_BATCH // tokens.shape[1])))
        sizes = {n: batches[0][:n] for n in (1, PROBED_WINDOWS)} | {batch.shape[0]: batch for batch in batches}
        self._calls = record_calls(loaded, {len(batch): batch for batch in sizes.values()}, blocks, compute)
        first = first_hidden(loaded, batches[0], blocks)
        stream_bytes = 2 * first[0].nbytes * len(tokens) * (2 if float_stream else 1)  # what enters, and what leaves
        widest = max((target.weight_shape[1] for target in job.targets), default=0)
        # a paused forward holds what the next linear reads, its residual, and about as much again in callers
        paused_bytes = (widest + 3 * first.shape[-1]) * compute.itemsize * tokens.numel() * (2 if float_stream else 1)
        budget = workspace.memory_budget if workspace else None
        on_disk = budget is not None and stream_bytes > budget
        self._pausing = budget is None or stream_bytes + paused_bytes <= budget
        if on_disk:
            progress.note(f"hidden states take {units.size(stream_bytes)}, above data.memory_budget: kept on disk")
        folder = workspace.scratch if workspace and on_disk else None
        self.inputs = HiddenStates(folder, [first])
        for batch in batches[1:]:
            self.inputs.append(first_hidden(loaded, batch, blocks))
        self.float_inputs = self.inputs if float_stream else None

    def at(self, index: int) -> tuple[HiddenStates, HiddenStates | None, dict[int, BlockCall], bool]:
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
        replace_linear(task.block, task.local_name(target), layer)
    for name, tensor in task.block.state_dict(keep_vars=True).items():
        tensor.data = tensors[f"{task.name}.{name}"].to(tensor)


def relative_change(found: Tensor, expected: Tensor) -> float:
    """``|found - expected|**2 / |expected|**2``, in float32."""
    return float((found.float() - expected.float()).square().sum() / expected.float().square().sum())


@torch.no_grad()
def walk(job: Job) -> Iterator[BlockTask]:
    """Each block of the float model with what enters it, one block of a streamed model in memory at a time.

    Nothing is quantized or kept, and the model is afterwards what it was.
    """
    loaded = job.loaded
    flow = BlockStates(job, loaded.dtype, False)
    blocks = loaded.blocks()
    for index, (name, block) in enumerate(progress.track(blocks, "reading blocks", len(blocks))):
        stored = [(tensor, tensor.data) for tensor in (*block.parameters(), *block.buffers())]
        bring_in(block, loaded, loaded.dtype)
        inputs, _, calls, _ = flow.at(index)
        task = BlockTask(index, name, block, inputs, None, job.of_block(index), calls, loaded.dtype)
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
