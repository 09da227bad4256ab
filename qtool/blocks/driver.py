"""The loop over the decoder blocks: each is quantized on the hidden states of the quantized blocks before it.

``run_blocks`` brings a block into memory, lets the method quantize it, sends the hidden states through it, keeps it in
the workspace, and frees it. So one block of a large model is in memory at a time, and a run that was killed goes on
after its last finished block. ``walk`` is the same loop over the float model, for code that only measures.

No architecture is copied: how the model calls its blocks (masks, rotary tables, anything else, which may differ from
block to block) is recorded from the model's own forward (``calls.py``), and which linears share an input is seen by
watching one forward of the block (``task.py``).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtool.blocks.calls import BlockCall
from qtool.blocks.hidden_states import HiddenStates
from qtool.blocks.job import Figures, FinishedBlock, Job, Result, Workspace, block_series, expert_figures
from qtool.blocks.shares import check_same
from qtool.blocks.state_errors import Sizes, relative_squares
from qtool.blocks.states import PROBED_WINDOWS, BlockStates
from qtool.blocks.tables import WINDOWS_PER_BATCH, HeadBlock
from qtool.blocks.task import BlockTask, Rows, rows_of
from qtool.models import expert_files
from qtool.models.linears import Target, packed_linears, replace_linear
from qtool.models.loaded import LoadedModel
from qtool.quant.packed_linear import PackedLinear
from qtool.reports.expert_tokens import coverage
from qtool.system import distributed, memory, progress


@torch.no_grad()
def run_blocks(
    job: Job,
    quantize_block: Callable[[BlockTask], Figures | None],
    *,
    with_float_states: bool = False,
    compute: torch.dtype | None = None,
) -> Result:
    """Call ``quantize_block`` for each block in order; the outputs of the quantized block are the inputs of the next.

    A head among the targets follows as one more block.

    Without text, tasks have no hidden states. With ``with_float_states`` they also have those of the float model.
    Hidden states between blocks have the model's dtype; a block computes in that dtype too, or in ``compute`` for a
    method that changes float weights. With a workspace, each block is kept there when it is done and then freed; for
    blocks that an earlier start of the run finished, ``quantize_block`` is not called.

    The result has the figures of every block: those that ``quantize_block`` returned and, with text, ``block_error`` on
    the first windows: the mean of ``(q(x) - f(x))**2`` relative to tokens and channels (``state_errors.py``), with
    ``f`` the float block, ``q`` the quantized block and ``x`` the hidden states that the quantized blocks before it
    made.

    Several processes share the text (``shares.py``), and end with the same bits: a block in which they do not is an
    error.
    """
    loaded, workspace = job.loaded, job.workspace
    assert loaded.streaming is None or workspace is not None, "a streamed model needs a workspace for its blocks"
    blocks = loaded.blocks()
    kept = _kept(workspace, job.num_parts)
    compute = compute or loaded.dtype
    states = None if job.tokens is None or all(kept) else BlockStates(job, compute, with_float_states, shared=True)
    found: list[tuple[Figures, dict[str, float]]] = []
    for index, (name, block) in enumerate(progress.track(blocks, "quantizing blocks", len(blocks))):
        done = kept[index]
        if done is None or states:
            if workspace and index + 1 < len(blocks):
                memory.Pages().read_ahead(blocks[index + 1][1].parameters())
            stored_dtypes = bring_in(block, loaded, compute)
            task = _task(job, index, name, block, states, compute)
            if done is None:
                done = _quantize(task, quantize_block, states)
                check_same(name, done.tensors)
                if workspace:
                    workspace.write(index, done)
            elif states:
                _pass_through(task, done, states)
            if workspace is None:
                _cast_back(block, stored_dtypes)
            else:
                _free(task.floats)
        if workspace:
            _free([block])
        found.append((done.figures, done.weight_errors))
    if job.tables.head is not None:
        done = kept[-1]
        if done is None:
            with progress.stage("quantizing the head"):
                done = _quantize_head(job, quantize_block, states, compute)
        if workspace:
            _free([loaded.model.get_submodule(job.tables.head.name)])
        found.append((done.figures, done.weight_errors))
    series = block_series(figures for figures, _ in found)
    if (seen := coverage(series)) is not None:
        progress.note(f"calibration of experts: {seen}")
    return Result(series, {name: error for _, errors in found for name, error in errors.items()})


def _kept(workspace: Workspace | None, num_blocks: int) -> list[FinishedBlock | None]:
    """Return the blocks that an earlier start finished, ``None`` for the others.

    Blocks after the first unfinished one do not count: the hidden states that they were made from may be different.
    """
    kept: list[FinishedBlock | None] = []
    for index in range(num_blocks):
        kept.append(workspace.read(index) if workspace and all(kept) else None)
    # a process that is late may find a block that the others began again
    count = distributed.lowest(sum(done is not None for done in kept))
    return [*kept[:count], *[None] * (num_blocks - count)]


def _task(
    job: Job, index: int, name: str, block: nn.Module, states: "BlockStates | None", compute: torch.dtype
) -> BlockTask:
    """Return the task of one block. It holds the block's float linears."""
    inputs, float_inputs, calls, pausing = states.at(index) if states else (HiddenStates(None), None, {}, True)
    return BlockTask(
        index,
        name,
        block,
        inputs,
        float_inputs,
        job.of_block(index),
        calls,
        compute,
        pausing,
        ending=states.ending if states else None,
        is_last=index + 1 == len(job.loaded.blocks()),
        streamed=job.loaded.streaming is not None,
    )


def _quantize(
    task: BlockTask, quantize_block: Callable[[BlockTask], Figures | None], states: "BlockStates | None"
) -> FinishedBlock:
    """Let the method quantize a block, and send the hidden states through it."""
    probing = states is not None and states.inputs.share.numbers[0] == 0  # the process that holds the first windows
    before = task.forward(task.inputs[0][:PROBED_WINDOWS]) if probing else None
    figures = dict(quantize_block(task) or {})
    left = {target.name for target in task.targets} - {task.full_name(part) for part in packed_linears(task.block)}
    assert not left, f"the method left these targets unquantized: {sorted(left)}"
    if states:
        states.advance(task)
        for counts in task.expert_tokens.values():
            figures |= expert_figures(distributed.summed(*counts.tolist()))
        if before is not None:
            with distributed.alone():  # the other processes do not measure
                sizes = Sizes.of([before])
            figures["block_error"] = float(relative_squares(states.inputs[0][: len(before)], before, sizes).mean())
    tensors = {task.full_name(part): value for part, value in task.block.state_dict().items()}
    return FinishedBlock(tensors, distributed.of_first(lambda: figures), task.weight_errors)


def _quantize_head(
    job: Job, quantize_block: Callable[[BlockTask], Figures | None], states: "BlockStates | None", compute: torch.dtype
) -> FinishedBlock:
    """Let the method quantize the head as the linear of a block after the last one, and keep it."""
    loaded, target, index = job.loaded, job.tables.head, len(job.loaded.blocks())
    assert target is not None
    parent, _, leaf = target.name.rpartition(".")
    block = HeadBlock(leaf, target.linear)
    inputs, float_inputs = states.of_head() if states else (HiddenStates(None), None)
    stored_dtypes = bring_in(block, loaded, compute)
    calls = {size: BlockCall((), {}) for size in (1, WINDOWS_PER_BATCH)}
    streamed = loaded.streaming is not None
    task = BlockTask(
        index, parent, block, inputs, float_inputs, [target], calls, compute, is_head=True, streamed=streamed
    )
    with distributed.alone():  # its few rows are the same in all processes
        done = _quantize(task, quantize_block, None)
    check_same(target.name, done.tensors)
    replace_linear(loaded.model, target.name, block.get_submodule(leaf))
    if job.workspace:
        job.workspace.write(index, done)
        _free(task.floats)
    else:
        _cast_back(block, stored_dtypes)
    return done


def _pass_through(task: BlockTask, done: FinishedBlock, states: "BlockStates") -> None:
    """Send the hidden states through a block that an earlier start finished."""
    if task.float_inputs is not None:
        task.float_outputs = task.through(task.float_inputs)
    _restore(task, done.tensors)
    states.advance(task)


def _free(modules: Iterable[nn.Module]) -> None:
    """Free the tensors of ``modules``, which are kept elsewhere."""
    for module in modules:
        module.to_empty(device=torch.device("meta"))
    memory.return_freed()


def gather(job: Job, *, on_device: bool = True) -> None:
    """Bring the whole model of a job into memory; blocks that its workspace keeps are in their places."""
    workspace = job.workspace
    finished = [workspace.read(index) for index in range(job.num_parts)] if workspace else []
    job.loaded.gather([each and each.tensors for each in finished], job.targets, on_device=on_device)


def bring_in(block: nn.Module, loaded: LoadedModel, compute: torch.dtype) -> dict[str, torch.dtype]:
    """Cast the tensors of ``block`` that have the model's dtype to ``compute``; return their dtypes by name.

    Tensors of another dtype keep it: tables and norms that an architecture holds in float32. A streamed block is copied
    from its file into memory, on the device that computes.
    """
    own = loaded.storage_dtype if loaded.streaming else loaded.dtype
    brought = expert_files.bring_in(block, loaded.device, lambda dtype: compute if dtype == own else dtype)
    dtypes, pages = {}, memory.Pages()
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if id(tensor) in brought:
            continue
        stored = tensor.data
        if stored.dtype == own and own != compute:
            dtypes[name] = own
        dtype = compute if stored.dtype == own else stored.dtype
        tensor.data = stored.to(loaded.device, dtype, copy=loaded.streaming is not None)
        if loaded.streaming:
            pages.drop(stored)
    return dtypes


def _cast_back(block: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Cast the tensors of ``block`` that ``bring_in`` cast to the dtypes they had."""
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if name in dtypes and tensor.is_floating_point():  # a packed layer has a marker where the weight was
            tensor.data = tensor.data.to(dtypes[name])


def _restore(task: BlockTask, tensors: dict[str, Tensor]) -> None:
    """Put packed layers and the tensors that were kept in their places in a block."""
    for target in task.targets:
        rows, columns = target.weight_shape
        bias = target.linear.bias
        with torch.device(task.inputs[0].device):
            layer = PackedLinear(columns, rows, target.spec, task.compute if isinstance(bias, Tensor) else None)
        replace_linear(task.block, task.local_name(target), layer)
    for name, tensor in task.block.state_dict(keep_vars=True).items():
        tensor.data = tensors[f"{task.name}.{name}"].to(tensor)


@torch.no_grad()
def walk(job: Job, states: "BlockStates | None" = None) -> Iterator[BlockTask]:
    """Yield a task for each block of the float model; one block of a streamed model is in memory at a time.

    Nothing is quantized or kept, and the model is unchanged afterwards. ``states``, if given, are those of the job
    before the first block, and afterwards those that leave the last.
    """
    loaded = job.loaded
    states = states or BlockStates(job, loaded.dtype, False)
    blocks = loaded.blocks()
    for index, (name, block) in enumerate(progress.track(blocks, "reading blocks", len(blocks))):
        with brought_in(block, loaded):
            inputs, _, calls, _ = states.at(index)
            task = BlockTask(index, name, block, inputs, None, job.of_block(index), calls, loaded.dtype)
            yield task
            states.advance(task)


@contextmanager
def brought_in(block: nn.Module, loaded: LoadedModel) -> Iterator[None]:
    """Have ``block`` in memory, where and in the dtype that ``loaded`` computes, inside the ``with`` block."""
    stored = [(tensor, tensor.data) for tensor in (*block.parameters(), *block.buffers())]
    bring_in(block, loaded, loaded.dtype)
    try:
        yield
    finally:
        expert_files.leave(block, loaded.storage_dtype)
        for tensor, data in stored:
            tensor.data = data


def group_inputs(task: BlockTask) -> Iterator[tuple[list[Target], list[Rows]]]:
    """Yield each group of linears that read the same tensor, with that input for each batch.

    The block runs once. The inputs of a group are freed when the next group is asked for, unless the caller holds them.
    """
    read: dict[nn.Module, list[Rows]] = {group[0].linear: [] for group in task.groups}

    def visit(linear: nn.Module, args: Any, kwargs: Any) -> None:  # Any: the arguments of whatever linear it is
        read[linear].append(rows_of(args))

    task.outputs = task.inputs.like()
    for hidden in task.inputs:
        task.outputs.append(task.observe(read, visit, [hidden])[0])
    for group in task.groups:
        yield group, read.pop(group[0].linear)
