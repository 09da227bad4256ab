"""How a model calls its decoder blocks: in which order, with what of its own for each batch, and what they share.

Found by three short forwards that pass hidden states by the blocks: of one text, of the same text with other results
of each block, and of another text; and one of both texts, which shows the dimension of windows. What differs between
the first two was made of what blocks computed, and what differs between the texts was made of the tokens. A tensor that
a block returns beside its hidden states may be an argument of the next block, as it is. What the block driver cannot do
exactly is refused here, before any block is computed.

Windows with pictures cannot be changed or put together so simply. There the texts are two windows as they are, and
every tensor with a dimension of one window counts as made of the tokens or pictures. Models that add features of
pictures to the hidden states between blocks are run once more, on hidden states of zeros, which shows what they add.
"""

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qtool.blocks.calls import (
    BlockCall,
    Blocks,
    Layout,
    Varying,
    around_blocks,
    is_shared,
    other_results,
    state_of,
)
from qtool.blocks.job import ModelInputs
from qtool.models.block_calls import Stop, replaced_forwards, with_hidden
from qtool.models.loaded import LoadedModel
from qtool.system.errors import InputError

NUM_TOKENS = 64  # most tokens of a short forward


class _Seen(NamedTuple):
    """One forward: hidden states that reached each block and that it passed on, and the leaves of its call.

    ``carried`` has for each block the positions of arguments that the block before it returned -> their position there.
    """

    hidden: list[Tensor]
    passed: list[Tensor]
    leaves: list[list[Any]]
    carried: list[dict[int, int]]
    output: Any

    def changed(self) -> list[bool]:
        """Return for each block whether it got other hidden states than the block before it passed on."""
        pairs = zip(self.passed, self.hidden[1:], strict=False)
        return [False, *(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)]


@torch.no_grad()
def find_layout(loaded: LoadedModel, batches: Sequence[ModelInputs], blocks: Blocks) -> Layout:
    """Return how the model calls its ``blocks``; ``batches`` are any inputs of the model.

    Raises:
        InputError: blocks are not called in order, once each; hidden states change between them in another way than by
            an addition; or an argument is made of what earlier blocks computed and no result of the last one, or
            differs between texts in another way than as a tensor of windows.
    """
    one, other, joined = _probes(loaded, batches)
    first = _run(loaded, one, blocks, 1.0, None)
    changed = _run(loaded, one, blocks, 2.0, first.output)
    second = _run(loaded, other, blocks, 1.0, first.output)
    both = None if joined is None else _run(loaded, joined, blocks, 1.0, first.output)
    shapes = zip(first.hidden[0].shape, (both or first).hidden[0].shape, strict=True)
    dim = next((dim for dim, sizes in enumerate(shapes) if sizes == ((1, 2) if both else (1, 1))), None)
    if dim is None:
        raise _refusal(loaded, "the hidden states between its blocks have no dimension of windows")
    runs = [first, changed, second, *([both] if both else [])]
    varying = []
    for index, (name, _) in enumerate(blocks):
        calls = [each.leaves[index] for each in runs]
        carried = first.carried[index]
        same = len({len(leaves) for leaves in calls}) == 1 and all(each.carried[index] == carried for each in runs)
        if not same:
            raise _refusal(loaded, f"the arguments of {name} depend on the text")
        calls = [[None if i in carried else leaf for i, leaf in enumerate(leaves)] for leaves in calls]
        made = [place for place, (a, b, *_) in enumerate(zip(*calls, strict=True)) if not _same(a, b)]
        if made:
            raise _refusal(loaded, f"an argument of {name} is made of what the blocks before it computed")
        found = _varying(calls) if both else _of_one_window(calls)
        if found is None:
            raise _refusal(loaded, f"an argument of {name} depends on the text and is no tensor of windows")
        varying.append(found)
    shared = tuple(tuple(place for place, leaf in enumerate(each) if is_shared(leaf)) for each in first.leaves)
    added = _added(loaded, one, blocks, first, changed, second)
    return Layout(first.output, dim, tuple(varying), shared, added, tuple(first.carried))


def _probes(loaded: LoadedModel, batches: Sequence[ModelInputs]) -> tuple[ModelInputs, ModelInputs, ModelInputs | None]:
    """Return inputs of one window, of another window, and of both; ``None`` where they cannot be put together."""
    if batches[0].keys() != {"input_ids"}:
        return batches[0], batches[-1], None
    one = batches[0]["input_ids"][:1, :NUM_TOKENS]
    other = (one + 1) % loaded.num_embeddings
    return {"input_ids": one}, {"input_ids": other}, {"input_ids": torch.cat([one, other])}


def _varying(calls: list[list[Any]]) -> Varying | None:
    """Return the arguments that differ between texts; ``None`` if one of them is no tensor of windows."""
    found = []
    for place, (a, _, c, d) in enumerate(zip(*calls, strict=True)):
        if _same(a, c):
            continue
        if not all(isinstance(x, Tensor) for x in (a, c, d)) or a.shape != c.shape or not a.dim():
            return None
        if (a.shape[0], d.shape[0]) != (1, 2) or a.shape[1:] != d.shape[1:]:
            return None
        found.append((place, 0))
    return tuple(found)


def _of_one_window(calls: list[list[Any]]) -> Varying | None:
    """Return the tensors with a dimension of one window; ``None`` if another argument differs between windows."""
    found = []
    for place, (a, _, c) in enumerate(zip(*calls, strict=True)):
        if isinstance(a, Tensor) and isinstance(c, Tensor) and a.dim() == c.dim() and 1 in a.shape:
            found.append((place, list(a.shape).index(1)))
        elif not _same(a, c):
            return None
    return tuple(found)


def _added(loaded: LoadedModel, one: ModelInputs, blocks: Blocks, first: _Seen, *others: _Seen) -> tuple[bool, ...]:
    """Return before which blocks the model adds something to the hidden states.

    ``first`` and the first of ``others`` are forwards of ``one``.

    Raises:
        InputError: it changes them in another way.
    """
    added = tuple(any(each) for each in zip(*(seen.changed() for seen in (first, *others)), strict=True))
    if not any(added):
        return added
    zeros = _run(loaded, one, blocks, 0.0, first.output)
    for index in (index for index, changes in enumerate(added) if changes):
        for seen in (first, others[0]):
            given, sent = seen.hidden[index], seen.passed[index - 1]
            if given.shape != sent.shape or not torch.equal(given, sent + zeros.hidden[index]):
                before, after = blocks[index - 1][0], blocks[index][0]
                raise _refusal(loaded, f"hidden states change between {before} and {after}")
    return added


def _run(loaded: LoadedModel, inputs: ModelInputs, blocks: Blocks, factor: float, output: Any) -> _Seen:
    """Run the model with its blocks left out, what they return multiplied by ``factor``.

    Without an ``output`` of a block to answer with, the first block is computed to have one.
    """
    modules = [block for _, block in blocks]
    seen = _Seen([], [], [], [], None)
    others: list[Any] = []  # the results of the last block besides hidden states

    def record(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal output
        if index != len(seen.hidden):
            raise _refusal(loaded, f"it calls {blocks[index][0]} where {len(seen.hidden)} blocks were called before")
        call = BlockCall(args, kwargs)
        leaves = call.leaves()
        places = {id(each): place for place, each in enumerate(others) if isinstance(each, Tensor)}
        seen.carried.append({i: places[id(leaf)] for i, leaf in enumerate(leaves) if id(leaf) in places})
        seen.hidden.append(hidden.clone())
        seen.leaves.append([copy.copy(leaf) if is_shared(leaf) else leaf for leaf in leaves])
        if output is None:
            output = _real(loaded, modules[0], hidden, call)
        seen.passed.append(hidden * factor)
        answer = tree_map_only(Tensor, lambda x: x * factor if x.is_floating_point() else x.clone(), output)
        others[:] = other_results(answer)
        return with_hidden(answer, seen.passed[-1].clone())

    head = loaded.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(_stop) if isinstance(head, nn.Module) else None
    try:
        with around_blocks(loaded, modules), replaced_forwards(modules, record), suppress(Stop):
            loaded.model(**inputs, use_cache=False)
    finally:
        if handle is not None:
            handle.remove()
    if len(seen.hidden) != len(blocks):
        raise _refusal(loaded, f"it calls {len(seen.hidden)} of its {len(blocks)} blocks")
    return seen._replace(output=output)


def _stop(*_: Any) -> None:
    raise Stop


def _real(loaded: LoadedModel, block: nn.Module, hidden: Tensor, call: BlockCall) -> Any:
    """Return what a block returns.

    Raises:
        InputError: it writes into an argument that is no mapping that blocks share.
    """
    stored = [(tensor, tensor.data) for tensor in (*block.parameters(), *block.buffers())]
    own = loaded.storage_dtype if loaded.streaming else loaded.dtype
    fitting = call.to(loaded.device, loaded.dtype)
    shared = {place: copy.copy(leaf) for place, leaf in enumerate(fitting.leaves()) if is_shared(leaf)}
    fitting = fitting.replaced(shared)
    before = state_of(fitting.leaves())
    try:
        for tensor, data in stored:  # as the driver brings it in
            if data.is_meta:  # the weights of experts in files, which a call reads
                continue
            tensor.data = data.to(loaded.device, loaded.dtype if data.dtype == own else data.dtype)
        out = type(block).forward(block, hidden.to(loaded.device, loaded.dtype), *fitting.args, **fitting.kwargs)
    finally:
        for tensor, data in stored:
            tensor.data = data
    if state_of(fitting.leaves()) != before:
        raise _refusal(loaded, "a block writes into an argument that other blocks read")
    return out


def _same(a: Any, b: Any) -> bool:
    """Return whether an argument is the same in two calls; of other objects than tensors and numbers, their classes."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, bool | int | float | str) or isinstance(b, bool | int | float | str):
        return bool(a == b)
    return type(a) is type(b)


def _refusal(loaded: LoadedModel, reason: str) -> InputError:
    return InputError(
        f"{loaded.path} cannot be quantized with calibration text, block by block: {reason}; use rtn or hqq, which "
        "read no text"
    )
