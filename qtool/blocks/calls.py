"""The calls of decoder blocks, recorded from the model's own forward, so that no architecture is copied.

For one forward of the model, the ``forward`` of each block is replaced on the instance by a function that records its
arguments and passes the hidden states on; no block is computed but the first, once, to see what a block returns.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qtool.models.loaded import LoadedModel


class Stop(Exception):
    """Raised inside a forward to end it early; the function that started the forward catches it."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block's forward besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device, dtype: torch.dtype) -> "BlockCall":
        """Return the call on ``device``, with floating-point tensors (masks, rotary tables) in ``dtype``."""
        args, kwargs = tree_map_only(
            Tensor, lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype), (self.args, self.kwargs)
        )
        return BlockCall(args, kwargs)


@contextmanager
def _recording(blocks: list[nn.Module], record: Callable[[int, Tensor, BlockCall], Any]) -> Iterator[None]:
    """Replace the forward of each block by ``record(index, hidden, call)`` inside the ``with`` block."""

    def recorder(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                return record(index, args[0], BlockCall(args[1:], kwargs))
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            return record(index, kwargs["hidden_states"], BlockCall((), rest))

        return forward

    for index, block in enumerate(blocks):
        block.forward = recorder(index)  # on the instance, removed below
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def record_calls(
    loaded: LoadedModel, batches: dict[int, Tensor], blocks: list[tuple[str, nn.Module]], dtype: torch.dtype
) -> dict[int, list[BlockCall]]:
    """Return the call of each block by batch size. Windows are full, so calls depend on nothing else of a batch.

    Calls are on the device that computes, their floating-point tensors in ``dtype``.
    """
    calls: dict[int, list[BlockCall]] = {}
    modules = [block for _, block in blocks]
    kind: list[type] = []

    def record(index: int, hidden: Tensor, call: BlockCall) -> Any:
        calls.setdefault(hidden.shape[0], []).append(call)
        if index == 0 and not kind:  # one real call shows if blocks return a tensor or a tuple
            like = next(p for p in modules[0].parameters() if p.is_floating_point())
            fitting = call.to(like.device, like.dtype)
            out = type(modules[0]).forward(modules[0], hidden.to(like), *fitting.args, **fitting.kwargs)
            kind.append(type(out))
        if index == len(modules) - 1:
            raise Stop
        return (hidden,) if kind[0] is tuple else hidden

    with _around_blocks(loaded, modules):
        for batch in batches.values():
            with _recording(modules, record), suppress(Stop):
                loaded.model(input_ids=batch, use_cache=False)
    return {size: [call.to(loaded.device, dtype) for call in each] for size, each in calls.items()}


def first_hidden(loaded: LoadedModel, batch: Tensor, blocks: list[tuple[str, nn.Module]]) -> Tensor:
    """Return the hidden states ``[b, t, d]`` that enter the first block."""
    found: list[Tensor] = []

    def record(index: int, hidden: Tensor, call: BlockCall) -> Any:
        found.append(hidden.to(loaded.device, loaded.dtype))
        raise Stop

    modules = [block for _, block in blocks]
    with _around_blocks(loaded, modules), _recording(modules[:1], record), suppress(Stop):
        loaded.model(input_ids=batch, use_cache=False)
    return found[0]


@contextmanager
def _around_blocks(loaded: LoadedModel, blocks: list[nn.Module]) -> Iterator[None]:
    """Let the modules before the blocks compute in ``loaded.dtype`` where a streamed model has another dtype.

    Embedding tables stay as they are, and the rows that are looked up are cast. The other modules are small and are
    cast as a whole; the output head is not reached.
    """
    if loaded.streaming is None or loaded.dtype == loaded.storage_dtype:
        yield
        return
    inside = {module for block in blocks for module in block.modules()} | {loaded.model.get_output_embeddings()}
    handles, cast = [], []
    for module in loaded.model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(lambda _, args, out: out.to(loaded.dtype)))
        elif module not in inside:
            cast += [
                (tensor, tensor.data)
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
                if tensor.dtype == loaded.storage_dtype
            ]
    try:
        for tensor, stored in cast:
            tensor.data = stored.to(loaded.dtype)
        yield
    finally:
        for tensor, stored in cast:
            tensor.data = stored
        for handle in handles:
            handle.remove()
