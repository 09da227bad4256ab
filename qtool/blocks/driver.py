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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from qtool.blocks.calls import Call, Stop, first_hidden, record_calls
from qtool.blocks.hidden_states import Stream
from qtool.models.loading import LoadedModel, Target, packed_linears, replace_linear
from qtool.quant.affine import QuantizedWeight, relative_error
from qtool.quant.packed_linear import PackedLinear
from qtool.system import memory, progress

TOKENS_PER_BATCH = 2048  # more are no faster on a processor, and need more memory
PROBED_WINDOWS = 4  # that measure a block's error
ERROR_OF = "weight_error "  # followed by a linear's name: a figure of its own
Figures = dict[str, float]
Series = dict[str, list[float]]


class Stage(NamedTuple):
    """Linears that read the same tensor, and what they read, ``[tokens, in]`` for each batch."""

    targets: list[Target]
    inputs: Iterable[Tensor]  # may be made anew each time they are gone through
    float_inputs: Iterable[Tensor] | None


@dataclass
class BlockTask:
    """One block, its inputs, and the linears to quantize in it."""

    index: int
    name: str
    block: nn.Module
    inputs: Stream  # each [b, t, d]: from the quantized blocks before
    float_inputs: Stream | None  # the same from the float model, for methods that ask for it
    targets: list[Target]
    calls: dict[int, Call]  # by batch size, 1 among them
    compute: torch.dtype  # of the block while it is worked on
    pausing: bool = True  # whether memory allows every batch's forward to be held in the middle of the block
    streamed: bool = False  # whether float weights may go as soon as they are packed
    outputs: Stream | None = None  # what the quantized block makes of the inputs; made by the driver when left out
    float_outputs: Stream | None = None
    weight_errors: Figures = field(default_factory=dict)  # of packed linears, against the weight the method rounded
    _groups: list[list[Target]] = field(default_factory=list)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[b, t, d]`` after the block as it is now."""
        call = self.calls[hidden.shape[0]]
        out = self.block(hidden.to(self.compute), *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result.to(hidden.dtype)

    def through(self, stream: Stream) -> Stream:
        """What the block as it is now makes of ``stream``, kept where that is kept."""
        outputs = stream.like()
        for hidden in stream:
            outputs.append(self.forward(hidden))
        return outputs

    @property
    def groups(self) -> list[list[Target]]:
        """The targets in the order they run, those that read the same tensor together (q, k, v; gate, up)."""
        if not self._groups:
            seen: dict[tuple[Any, ...], list[Target]] = {}
            kept: list[Tensor] = []  # holds the tensors, so that no address is used twice
            by_module = {target.linear: target for target in self.targets}

            def visit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0]
                kept.append(x)
                seen.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(by_module[module])

            self.observe(by_module, visit, [self.inputs[0][:1]])
            unused = {target.name for target in self.targets} - {t.name for group in seen.values() for t in group}
            assert not unused, f"the block's forward does not use {sorted(unused)}"
            self._groups = list(seen.values())
        return self._groups

    @torch.no_grad()
    def observe(
        self,
        modules: Iterable[nn.Module],
        visit: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
        inputs: Iterable[Tensor],
    ) -> list[Tensor]:
        """Run the block on ``inputs``; ``visit`` gets each module's arguments just before it runs. Returns outputs."""
        hooks = [module.register_forward_pre_hook(visit, with_kwargs=True) for module in modules]
        try:
            return [self.forward(hidden) for hidden in inputs]
        finally:
            for hook in hooks:
                hook.remove()

    def pass_floats(self, leaders: Iterable[nn.Module] = ()) -> dict[nn.Module, Tensor]:
        """Set ``float_outputs`` by the block as it is now.

        Returns the sum of squares ``[in]`` of each channel that ``leaders`` read meanwhile.
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
        return squares

    def stages(self) -> Iterator[Stage]:
        """Each group of linears in the order they run; the caller packs them before it asks for the next group."""
        if self.pausing:
            yield from self._paused_stages()
            return
        for group in self.groups:
            read = partial(_Reader, self, group[0])
            yield Stage(group, read(self.inputs), read(self.float_inputs, True) if self.float_inputs else None)
        if self.float_inputs is not None:
            with self._unpacked():
                self.float_outputs = self.through(self.float_inputs)

    def _paused_stages(self) -> Iterator[Stage]:
        leaders = [group[0] for group in self.groups]
        runs = [greenlet(self.forward) for _ in self.inputs]
        float_runs = [greenlet(self.forward) for _ in self.float_inputs or ()]
        floats = set(float_runs)

        def pausing(linear: nn.Module) -> Callable[[Tensor], Tensor]:
            forward, leads = linear.forward, any(leader.linear is linear for leader in leaders)
            name = next(target.name for target in self.targets if target.linear is linear)

            def paused_forward(x: Tensor) -> Tensor:
                run = getcurrent()
                if leads:
                    assert run.parent is not None
                    run.parent.switch(x.flatten(0, -2))
                layer = linear if run in floats else self.block.get_submodule(self._local(name))
                result: Tensor = forward(x) if layer is linear else layer(x)
                return result

            return paused_forward

        for target in self.targets:
            target.linear.forward = pausing(target.linear)  # on the instance, removed below
        try:
            inputs = [run.switch(hidden) for run, hidden in zip(runs, self.inputs, strict=True)]
            float_inputs = [run.switch(hidden) for run, hidden in zip(float_runs, self.float_inputs or (), strict=True)]
            # below, float runs see the float linears wherever they look, whatever has been packed
            for group in self.groups:
                yield Stage(group, inputs, float_inputs if self.float_inputs is not None else None)
                if self.streamed and self.float_inputs is None:
                    for target in group:
                        target.linear.to_empty(device=torch.device("meta"))
                memory.return_freed()
                self._expand(group)
                del inputs[:], float_inputs[:]  # the caller is done with them: let each go as its batch moves on
                for run in runs:
                    inputs.append(run.switch())
                with self._unpacked():
                    for run in float_runs:
                        float_inputs.append(run.switch())
                self._contract(group)
                memory.return_freed()
            self.outputs = Stream(None, inputs)
            self.float_outputs = Stream(None, float_inputs) if self.float_inputs is not None else None
        finally:
            for target in self.targets:
                del target.linear.forward
            self._contract(self.targets)

    def _expand(self, group: list[Target]) -> None:
        """Let the packed layers of ``group`` expand their weight once, not in every call of the stages; same bits."""
        for target in group:
            layer = self.block.get_submodule(self._local(target.name))
            if isinstance(layer, PackedLinear):
                dense = layer.dequantized(self.compute)
                layer.forward = partial(F.linear, weight=dense, bias=layer.bias)  # type: ignore[method-assign]

    def _contract(self, group: list[Target]) -> None:
        """Forget the expanded weights of ``group``."""
        for target in group:
            vars(self.block.get_submodule(self._local(target.name))).pop("forward", None)

    @contextmanager
    def _unpacked(self) -> Iterator[None]:
        """The float linears back in their places, for as long as the context lasts."""
        packed = {target: self.block.get_submodule(self._local(target.name)) for target in self.targets}
        for target in packed:
            replace_linear(self.block, self._local(target.name), target.linear)
        try:
            yield
        finally:
            for target, layer in packed.items():
                replace_linear(self.block, self._local(target.name), layer)

    def pack(self, target: Target, weight: QuantizedWeight) -> None:
        """Put the packed layer in the place of the target."""
        self.weight_errors[ERROR_OF + target.name] = relative_error(target.stored_weight, weight)
        bias = target.linear.bias
        layer = PackedLinear.from_quantized(weight, bias if isinstance(bias, Tensor) else None)
        replace_linear(self.block, self._local(target.name), layer)

    def _local(self, name: str) -> str:
        return name.removeprefix(f"{self.name}.")


@dataclass
class _Reader:
    """What a linear reads, ``[tokens, in]`` for each batch, made anew each time: slower than pausing, and smaller."""

    task: BlockTask
    target: Target
    stream: Stream
    unpacked: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._read, self.stream)

    def _read(self, hidden: Tensor) -> Tensor:
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0].flatten(0, -2))
            raise Stop

        with self.task._unpacked() if self.unpacked else nullcontext(), suppress(Stop):
            self.task.observe([self.target.linear], stop, [hidden])
        return found[0]


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
            progress.note(f"hidden states take {progress.size(stream_bytes)}, above data.memory_budget: kept on disk")
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
