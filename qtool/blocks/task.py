"""What a method does with one decoder block: its targets, the groups that share an input, and packing."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from qtool.blocks.calls import BlockCall, Stop
from qtool.blocks.hidden_states import HiddenStates
from qtool.models.linears import Target, replace_linear
from qtool.quant.affine import QuantizedWeight, relative_error
from qtool.quant.packed_linear import PackedLinear
from qtool.system import memory


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
    inputs: HiddenStates  # each [b, t, d]: from the quantized blocks before
    float_inputs: HiddenStates | None  # the same from the float model, for methods that ask for it
    targets: list[Target]
    calls: dict[int, BlockCall]  # by batch size, 1 among them
    compute: torch.dtype  # of the block while it is worked on
    pausing: bool = True  # whether memory allows every batch's forward to be held in the middle of the block
    streamed: bool = False  # whether float weights may go as soon as they are packed
    outputs: HiddenStates | None = None  # of the quantized block; ``None``: the driver makes them
    float_outputs: HiddenStates | None = None
    weight_errors: dict[str, float] = field(default_factory=dict)  # of packed linears, against the float weight
    _groups: list[list[Target]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Hold the float linears, which methods and float forwards need until the block is done."""
        self.floats = [target.linear for target in self.targets]

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[b, t, d]`` after the block as it is now."""
        call = self.calls[hidden.shape[0]]
        out = self.block(hidden.to(self.compute), *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result.to(hidden.dtype)

    def through(self, stream: HiddenStates) -> HiddenStates:
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
            name = next(self.local_name(target) for target in self.targets if target.linear is linear)

            def paused_forward(x: Tensor) -> Tensor:
                run = getcurrent()
                if leads:
                    assert run.parent is not None
                    run.parent.switch(x.flatten(0, -2))
                layer = linear if run in floats else self.block.get_submodule(name)
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
            self.outputs = HiddenStates(None, inputs)
            self.float_outputs = HiddenStates(None, float_inputs) if self.float_inputs is not None else None
        finally:
            for target in self.targets:
                del target.linear.forward
            self._contract(self.targets)

    def _expand(self, group: list[Target]) -> None:
        """Let the packed layers of ``group`` expand their weight once, not in every call of the stages; same bits."""
        for target in group:
            layer = self.block.get_submodule(self.local_name(target))
            if isinstance(layer, PackedLinear):
                dense = layer.dequantized(self.compute)
                layer.forward = partial(F.linear, weight=dense, bias=layer.bias)  # type: ignore[method-assign]

    def _contract(self, group: list[Target]) -> None:
        """Forget the expanded weights of ``group``."""
        for target in group:
            vars(self.block.get_submodule(self.local_name(target))).pop("forward", None)

    @contextmanager
    def _unpacked(self) -> Iterator[None]:
        """The float linears back in their places, for as long as the context lasts."""
        packed = {target: self.block.get_submodule(self.local_name(target)) for target in self.targets}
        for target in packed:
            replace_linear(self.block, self.local_name(target), target.linear)
        try:
            yield
        finally:
            for target, layer in packed.items():
                replace_linear(self.block, self.local_name(target), layer)

    def pack(self, target: Target, weight: QuantizedWeight) -> None:
        """Put the packed layer in the place of the target."""
        self.weight_errors[target.name] = relative_error(target.stored_weight, weight)
        bias = target.linear.bias
        layer = PackedLinear.from_quantized(weight, bias if isinstance(bias, Tensor) else None)
        replace_linear(self.block, self.local_name(target), layer)

    def local_name(self, target: Target) -> str:
        """The name of a target within its block."""
        return target.name.removeprefix(f"{self.name}.")


@dataclass
class _Reader:
    """What a linear reads, ``[tokens, in]`` for each batch, made anew each time: slower than pausing, and smaller."""

    task: BlockTask
    target: Target
    stream: HiddenStates
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
