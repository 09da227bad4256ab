"""How a model calls its decoder blocks: in which order, with what of its own for each batch, and what they share.

Found by three short forwards that pass hidden states by the blocks: of one text, of the same text with other results
of each block, and of another text; and one of both texts, which shows the dimension of windows. What differs between
the first two was made of what blocks computed, and what differs between the texts was made of the tokens. A tensor that
a block returns beside its hidden states may be an argument of the next block, as it is. What the block driver cannot do
exactly is refused here, before any block is computed.
"""

import copy
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qtool.blocks.calls import BlockCall, Blocks, Layout, around_blocks, is_shared, other_results, state_of
from qtool.models.block_calls import Stop, replaced_forwards, with_hidden
from qtool.models.loaded import LoadedModel
from qtool.system.errors import InputError

NUM_TOKENS = 64  # most tokens of a short forward


class _Seen(NamedTuple):
    """One forward: hidden states that reached each block, the leaves of its call, and what is passed from the last one.

    ``carried`` has for each block the positions of arguments that the block before it returned -> their position there.
    """

    hidden: list[Tensor]
    leaves: list[list[Any]]
    carried: list[dict[int, int]]
    output: Any


@torch.no_grad()
def find_layout(loaded: LoadedModel, tokens: Tensor, blocks: Blocks) -> Layout:
    """Return how the model calls its ``blocks``; ``tokens`` ``[n, t]`` are any text.

    Raises:
        InputError: blocks are not called in order, once each; hidden states change between them; or an argument is
            made of what earlier blocks computed and no result of the last one, or differs between texts in another way
            than as a tensor of windows.
    """
    one = tokens[:1, :NUM_TOKENS].to(loaded.model.device)
    other = (one + 1) % loaded.num_embeddings
    first = _run(loaded, one, blocks, 1.0, None)
    changed = _run(loaded, one, blocks, 2.0, first.output)
    second = _run(loaded, other, blocks, 1.0, first.output)
    both = _run(loaded, torch.cat([one, other]), blocks, 1.0, first.output)
    shapes = zip(first.hidden[0].shape, both.hidden[0].shape, strict=True)
    dim = next((dim for dim, sizes in enumerate(shapes) if sizes == (1, 2)), None)
    if dim is None:
        raise _refusal(loaded, "the hidden states between its blocks have no dimension of windows")
    varying = []
    for index, (name, _) in enumerate(blocks):
        calls = [each.leaves[index] for each in (first, changed, second, both)]
        carried = first.carried[index]
        if len({len(leaves) for leaves in calls}) > 1 or any(
            x.carried[index] != carried for x in (changed, second, both)
        ):
            raise _refusal(loaded, f"the arguments of {name} depend on the text")
        calls = [[None if i in carried else leaf for i, leaf in enumerate(leaves)] for leaves in calls]
        made = [place for place, (a, b, *_) in enumerate(zip(*calls, strict=True)) if not _same(a, b)]
        if made:
            raise _refusal(loaded, f"an argument of {name} is made of what the blocks before it computed")
        differs = tuple(place for place, (a, _, c, _) in enumerate(zip(*calls, strict=True)) if not _same(a, c))
        for place in differs:
            a, _, c, d = (leaves[place] for leaves in calls)
            fits = all(isinstance(x, Tensor) for x in (a, c, d)) and a.shape == c.shape and a.dim() > 0
            if not fits or (a.shape[0], d.shape[0]) != (1, 2) or a.shape[1:] != d.shape[1:]:
                raise _refusal(loaded, f"an argument of {name} depends on the text and is no tensor of windows")
        varying.append(differs)
    shared = tuple(tuple(place for place, leaf in enumerate(each) if is_shared(leaf)) for each in first.leaves)
    return Layout(first.output, dim, tuple(varying), shared, tuple(first.carried))


def _run(loaded: LoadedModel, tokens: Tensor, blocks: Blocks, factor: float, output: Any) -> _Seen:
    """Run the model with its blocks left out, what they return multiplied by ``factor``.

    Without an ``output`` of a block to answer with, the first block is computed to have one.
    """
    modules = [block for _, block in blocks]
    seen = _Seen([], [], [], None)
    passed: list[Tensor] = []
    others: list[Any] = []  # what a block returns besides hidden states

    def record(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal output
        if index != len(seen.hidden):
            raise _refusal(loaded, f"it calls {blocks[index][0]} where {len(seen.hidden)} blocks were called before")
        if passed and not (hidden.shape == passed[-1].shape and torch.equal(hidden, passed[-1])):
            raise _refusal(loaded, f"hidden states change between {blocks[index - 1][0]} and {blocks[index][0]}")
        call = BlockCall(args, kwargs)
        leaves = call.leaves()
        places = {id(each): place for place, each in enumerate(others) if isinstance(each, Tensor)}
        seen.carried.append({i: places[id(leaf)] for i, leaf in enumerate(leaves) if id(leaf) in places})
        seen.hidden.append(hidden.clone())
        seen.leaves.append([copy.copy(leaf) if is_shared(leaf) else leaf for leaf in leaves])
        if output is None:
            output = _real(loaded, modules[0], hidden, call)
        passed.append(hidden * factor)
        answer = tree_map_only(Tensor, lambda x: x * factor if x.is_floating_point() else x.clone(), output)
        others[:] = other_results(answer)
        return with_hidden(answer, passed[-1].clone())

    head = loaded.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(_stop) if isinstance(head, nn.Module) else None
    try:
        with around_blocks(loaded, modules), replaced_forwards(modules, record), suppress(Stop):
            loaded.model(input_ids=tokens, use_cache=False)
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
