"""The block driver: one decoder block after another, each fed by the blocks already quantized.

How the model calls its blocks (masks, rotary tables, anything else, which may differ from block to block) is recorded
from the model's own forward, so no architecture is copied. Which linears share an input, and in what order they run,
is seen by watching one forward of the block.

``BlockTask.stages`` serves methods that quantize a block's linears in that order, each on inputs that already show the
linears before it quantized. Every batch's forward runs once, in a greenlet that pauses where a group of linears is
about to read its input; when the group is packed, all batches go on from there. So a block costs one forward however
many groups it has, where recomputing costs one for each.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qtool import progress
from qtool.models import LoadedModel, Target, packed_linears, replace_linear
from qtool.quant.affine import QuantizedWeight
from qtool.quant.linear import PackedLinear

TOKENS_PER_BATCH = 2048  # more are no faster on a processor, and need more memory
PROBED_WINDOWS = 4  # that measure a block's error


def _return_freed_memory() -> None:
    """Give the system what has been freed. glibc keeps the holes between paused batches: a fifth of our peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)


class _Stop(Exception):
    """Ends a forward early; never leaves this file."""


@dataclass(frozen=True)
class Call:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> "Call":
        """The same with floating-point tensors (masks, rotary tables) in ``dtype``."""
        args, kwargs = tree_map_only(
            Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (self.args, self.kwargs)
        )
        return Call(args, kwargs)


class Stage(NamedTuple):
    """Linears that read the same tensor, and what they read, ``[tokens, in]`` for each batch."""

    targets: list[Target]
    inputs: list[Tensor]
    float_inputs: list[Tensor] | None


@dataclass
class BlockTask:
    """One block, its inputs, and the linears to quantize in it."""

    index: int
    name: str
    block: nn.Module
    inputs: list[Tensor]  # each [b, t, d]: from the quantized blocks before
    float_inputs: list[Tensor] | None  # the same from the float model, for methods that ask for it
    targets: list[Target]
    calls: dict[int, Call]  # by batch size, 1 among them
    compute: torch.dtype  # of the block while it is worked on
    outputs: list[Tensor] | None = None  # set by stages(): what the quantized block makes of the inputs
    float_outputs: list[Tensor] | None = None
    _groups: list[list[Target]] = field(default_factory=list)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[b, t, d]`` after the block as it is now."""
        call = self.calls[hidden.shape[0]]
        out = self.block(hidden.to(self.compute), *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result.to(hidden.dtype)

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
        inputs: list[Tensor],
    ) -> list[Tensor]:
        """Run the block on ``inputs``; ``visit`` gets each module's arguments just before it runs. Returns outputs."""
        hooks = [module.register_forward_pre_hook(visit, with_kwargs=True) for module in modules]
        try:
            return [self.forward(hidden) for hidden in inputs]
        finally:
            for hook in hooks:
                hook.remove()

    def stages(self) -> Iterator[Stage]:
        """Each group of linears in the order they run; the caller packs them before it asks for the next group."""
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
                self._expand(group)
                _return_freed_memory()
                del inputs[:], float_inputs[:]  # the caller is done with them: let each go as its batch moves on
                for run in runs:
                    inputs.append(run.switch())
                with self._unpacked():
                    for run in float_runs:
                        float_inputs.append(run.switch())
            self.outputs = list(inputs)
            self.float_outputs = list(float_inputs) if self.float_inputs is not None else None
        finally:
            for target in self.targets:
                del target.linear.forward
            for layer in packed_linears(self.block).values():
                vars(layer).pop("forward", None)

    def _expand(self, group: list[Target]) -> None:
        """Let the packed layers of ``group`` expand their weight once, not in every call of the stages; same bits."""
        for target in group:
            layer = self.block.get_submodule(self._local(target.name))
            if isinstance(layer, PackedLinear):
                dense = layer.dequantized().to(self.compute)
                layer.forward = partial(F.linear, weight=dense, bias=layer.bias)  # type: ignore[method-assign]

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
        bias = target.linear.bias
        layer = PackedLinear.from_quantized(weight, bias if isinstance(bias, Tensor) else None)
        replace_linear(self.block, self._local(target.name), layer)

    def _local(self, name: str) -> str:
        return name.removeprefix(f"{self.name}.")


@torch.no_grad()
def run_blocks(
    loaded: LoadedModel,
    tokens: Tensor,
    targets: list[Target],
    quantize_block: Callable[[BlockTask], None],
    *,
    float_stream: bool = False,
    compute: torch.dtype | None = None,
) -> list[float]:
    """Call ``quantize_block`` for each block in order, and carry its new outputs to the next.

    ``tokens`` ``[n, t]``. The hidden states between blocks have the model's dtype; a block computes in that too, or in
    ``compute`` for a method that changes float weights. Returns each block's relative output error on the
    first windows, ``|q(x) - f(x)|**2 / |f(x)|**2`` with ``f`` the float block and ``x`` the quantized stream.
    """
    batches = list(tokens.to(loaded.device).split(max(1, TOKENS_PER_BATCH // tokens.shape[1])))
    blocks = loaded.blocks()
    num_probed = min(PROBED_WINDOWS, batches[0].shape[0])
    sizes = {n: batches[0][:n] for n in (1, num_probed)} | {batch.shape[0]: batch for batch in batches}
    calls = _record_calls(loaded, sizes, blocks)
    inputs = [_first_hidden(loaded, batch, blocks[0][1]) for batch in batches]
    float_inputs = list(inputs) if float_stream else None
    errors = []
    compute = compute or loaded.dtype
    calls = {size: [call.to(compute) for call in each] for size, each in calls.items()}
    for index, (name, block) in enumerate(progress.track(blocks, "quantizing blocks", len(blocks))):
        mine = [target for target in targets if target.block == index]
        names = _cast(block, None, loaded.dtype, compute)
        mine_calls = {size: each[index] for size, each in calls.items()}
        task = BlockTask(index, name, block, inputs, float_inputs, mine, mine_calls, compute)
        before = task.forward(inputs[0][:num_probed])
        quantize_block(task)
        left = {target.name for target in mine} - {f"{name}.{part}" for part in packed_linears(block)}
        assert not left, f"the method left these as they were: {sorted(left)}"
        inputs = task.outputs or [task.forward(x) for x in inputs]
        float_inputs = task.float_outputs
        assert (float_inputs is not None) == float_stream, "a method that asks for the float stream must use stages()"
        _cast(block, names, compute, loaded.dtype)
        errors.append(_relative_error(inputs[0][: before.shape[0]], before))
    return errors


def _cast(block: nn.Module, names: set[str] | None, old: torch.dtype, new: torch.dtype) -> set[str]:
    """Bring the tensors of ``block`` that are ``old`` (and in ``names``, when given) to ``new``; returns their names.

    What has another dtype keeps it: tables and norms that an architecture holds in float32.
    """
    if old == new:
        return set()
    found = set()
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if tensor.dtype == old and (names is None or name in names):
            tensor.data = tensor.data.to(new)
            found.add(name)
    return found


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).square().sum() / expected.float().square().sum())


@contextmanager
def _recording(blocks: list[nn.Module], record: Callable[[int, Tensor, Call], Any]) -> Iterator[None]:
    """Replace each block's forward by ``record(index, hidden, call)`` for one forward of the model."""

    def recorder(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                return record(index, args[0], Call(args[1:], kwargs))
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            return record(index, kwargs["hidden_states"], Call((), rest))

        return forward

    for index, block in enumerate(blocks):
        block.forward = recorder(index)  # on the instance, removed below
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _record_calls(
    loaded: LoadedModel, batches: dict[int, Tensor], blocks: list[tuple[str, nn.Module]]
) -> dict[int, list[Call]]:
    """How the model calls each block, by batch size: windows are full, so nothing else varies between batches."""
    calls: dict[int, list[Call]] = {}
    modules = [block for _, block in blocks]
    kind: list[type] = []

    def record(index: int, hidden: Tensor, call: Call) -> Any:
        calls.setdefault(hidden.shape[0], []).append(call)
        if index == 0 and not kind:  # one real call shows whether blocks return a tensor or a tuple
            out = type(modules[0]).forward(modules[0], hidden, *call.args, **call.kwargs)
            kind.append(type(out))
        if index == len(modules) - 1:
            raise _Stop
        return (hidden,) if kind[0] is tuple else hidden

    for batch in batches.values():
        with _recording(modules, record):
            try:
                loaded.model(input_ids=batch, use_cache=False)
            except _Stop:
                continue
    return calls


def _first_hidden(loaded: LoadedModel, batch: Tensor, block: nn.Module) -> Tensor:
    """Hidden states ``[b, t, d]`` that enter the first block."""
    found: list[Tensor] = []

    def record(index: int, hidden: Tensor, call: Call) -> Any:
        found.append(hidden)
        raise _Stop

    with _recording([block], record), suppress(_Stop):
        loaded.model(input_ids=batch, use_cache=False)
    return found[0]
