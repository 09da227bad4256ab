"""The calls of decoder blocks, recorded from the model's own forward, so that no architecture is copied.

For one forward of the model, the ``forward`` of each block is replaced on the instance by a function that records its
arguments and passes the hidden states on; no block is computed but the first, once, to see what a block returns.

Windows are full, so most arguments (masks, rotary tables) are the same for every batch of a size, and are recorded once
for each size. Three short forwards show the others (``layout.py``): tensors made from the tokens, which each batch
brings along (``hidden_states.Batch``), and mappings that blocks write into, such as shared keys and values. A block
gets a copy of such a mapping, with what the blocks before it wrote for its windows, and its output brings the content
along.
"""

import copy
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from qtool.blocks.hidden_states import Batch, Beside, beside_of
from qtool.blocks.job import ModelInputs
from qtool.blocks.pictures import computing
from qtool.models.block_calls import Stop, hidden_of, replaced_forwards, with_hidden
from qtool.models.linears import beside_decoder
from qtool.models.loaded import LoadedModel
from qtool.system.errors import InputError

Blocks = list[tuple[str, nn.Module]]
Varying = tuple[tuple[int, int], ...]  # position and dimension of windows of each argument that differs between batches
ADDED = ("added",)  # name of what a model adds to hidden states before a block, among the tensors of ``Beside``


def is_shared(value: Any) -> bool:
    """Return whether an argument is a mapping that blocks write into: one that is empty, or no plain ``dict``."""
    return isinstance(value, MutableMapping) and (not value or not isinstance(value, dict))


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block's forward besides the hidden states.

    ``varying`` are the positions, among the leaves of ``(args, kwargs)``, of the arguments that differ between batches,
    each with its dimension of windows; ``shared`` the positions of mappings that blocks write into; ``carried`` those
    of arguments that the block before returned, with their position there (``other_results``). ``returned`` are the
    positions of results that the next block reads. ``dim`` is the dimension of windows of the hidden states that the
    block reads.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    varying: Varying = ()
    shared: tuple[int, ...] = ()
    carried: dict[int, int] = field(default_factory=dict, kw_only=True)
    returned: frozenset[int] = field(default=frozenset(), kw_only=True)
    dim: int = field(default=0, kw_only=True)

    def to(self, device: torch.device, dtype: torch.dtype) -> "BlockCall":
        """Return the call on ``device``, with floating-point tensors (masks, rotary tables) in ``dtype``."""
        args, kwargs = tree_map_only(
            Tensor,
            lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype),
            (self.args, self.kwargs),
            is_leaf=is_shared,
        )
        return replace(self, args=args, kwargs=kwargs)

    def leaves(self) -> list[Any]:
        """Return the arguments, containers taken apart."""
        return tree_flatten((self.args, self.kwargs), is_leaf=is_shared)[0]

    def replaced(self, leaves: dict[int, Any]) -> "BlockCall":
        """Return the call with other leaves at some positions."""
        own, spec = tree_flatten((self.args, self.kwargs), is_leaf=is_shared)
        args, kwargs = tree_unflatten([leaves.get(index, leaf) for index, leaf in enumerate(own)], spec)
        return replace(self, args=args, kwargs=kwargs)

    def run(self, block: nn.Module, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what ``block`` makes of hidden states ``[b, ...]``, computed in ``dtype``; windows come first."""
        call, beside, plain = self, beside_of(hidden), hidden
        if isinstance(hidden, Batch):
            plain = hidden.as_subclass(Tensor)
        shared = [_filled(self.leaves()[place], number, beside) for number, place in enumerate(self.shared)]
        if self.varying or self.shared or self.carried:
            missing = [place for place, _ in self.varying if (place,) not in beside]
            assert not missing, "these hidden states lost the arguments that belong to their windows"
            brought: dict[int, Any] = {place: beside[place,].movedim(0, dim) for place, dim in self.varying}
            brought |= {place: beside.get(("carried", at)) for place, at in self.carried.items()}
            call = self.replaced(brought | dict(zip(self.shared, shared, strict=True)))
        plain = plain.to(dtype) + beside[ADDED].to(dtype) if ADDED in beside else plain.to(dtype)
        before = state_of(call.leaves())
        output = block(plain.movedim(0, self.dim) if self.dim else plain, *call.args, **call.kwargs)
        out = hidden_of(output)
        if state_of(call.leaves()) != before:
            raise InputError(
                f"{type(block).__name__}, a decoder block, writes into an argument that other blocks read; such models "
                "are not supported with calibration text: use rtn or hqq, which read no text"
            )
        out = (out.movedim(self.dim, 0) if self.dim else out).to(hidden.dtype)
        written = {name: x for number, each in enumerate(shared) for name, x in _content(each, number, len(out))}
        written |= _carried(output, self.returned, len(out))
        return Batch.of(out, written) if written else out


def other_results(output: Any) -> list[Any]:
    """Return what a block returns besides hidden states, containers taken apart."""
    return tree_flatten(output[1:])[0] if isinstance(output, tuple | list) else []


def _carried(output: Any, places: frozenset[int], windows: int) -> dict[tuple[Any, ...], Tensor]:
    """Return the results at ``places`` that are tensors, by name.

    Raises:
        InputError: the first dimension of one is not that of windows.
    """
    results = other_results(output)
    found = {("carried", at): results[at].detach() for at in places if isinstance(results[at], Tensor)}
    if any(not x.dim() or x.shape[0] != windows for x in found.values()):
        raise InputError(
            "a decoder block passes on a result that is no tensor of windows; such models are not supported with "
            "calibration text: use rtn or hqq"
        )
    return found


def state_of(leaves: Sequence[Any]) -> list[Any]:
    """Return what shows that a block wrote into an argument other than a shared mapping."""
    return [
        (0 if leaf.is_inference() else leaf._version)
        if isinstance(leaf, Tensor)
        else sorted(map(id, getattr(leaf, "__dict__", {}).values()))
        for leaf in leaves
        if not is_shared(leaf)
    ]


def _filled(mapping: Any, number: int, beside: Beside) -> Any:
    """Return a copy of an empty shared mapping with the content that hidden states bring along."""
    filled = copy.copy(mapping)
    parts: dict[Any, list[Tensor]] = {}
    for name, tensor in beside.items():
        if name[0] == "shared" and name[1] == number:
            parts.setdefault(name[2:4], []).append(tensor)
    for (key, is_tuple), tensors in parts.items():
        filled[key] = tuple(tensors) if is_tuple else tensors[0]
    return filled


def _content(mapping: MutableMapping[Any, Any], number: int, windows: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield name and value of each tensor in a shared mapping.

    Raises:
        InputError: there is something else in it, or a tensor whose first dimension is not that of windows.
    """
    for key, value in mapping.items():
        parts = value if isinstance(value, tuple | list) else (value,)
        if not all(isinstance(part, Tensor) and part.dim() and part.shape[0] == windows for part in parts):
            raise InputError(
                f"a decoder block leaves {key!r} for later blocks, which is no tensor of windows; such models are not "
                "supported with calibration text: use rtn or hqq"
            )
        for place, part in enumerate(parts):
            yield ("shared", number, key, isinstance(value, tuple | list), place), part.detach()


@dataclass(frozen=True)
class Layout:
    """The common layout of a model's calls of its blocks, which ``layout.find_layout`` finds once.

    ``output`` is what the first block returned; ``varying``, ``shared`` and ``carried`` are those of the call of each
    block; ``added`` says before which blocks the model adds something to the hidden states, such as features of
    pictures.
    """

    output: Any
    dim: int
    varying: tuple[Varying, ...]
    shared: tuple[tuple[int, ...], ...]
    added: tuple[bool, ...]
    carried: tuple[dict[int, int], ...]

    def call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockCall:
        """Return the call of block ``index`` without the arguments that belong to windows."""
        carried, following = self.carried[index], self.carried[index + 1 : index + 2]
        returned = frozenset(at for each in following for at in each.values())
        call = BlockCall(
            args,
            kwargs,
            self.varying[index],
            self.shared[index],
            carried=carried,
            returned=returned,
            dim=self.dim,
        )
        places = (*(place for place, _ in call.varying), *carried)
        return call.replaced(dict.fromkeys(places)) if places else call


def record_calls(
    loaded: LoadedModel, batches: Sequence[ModelInputs], blocks: Blocks, dtype: torch.dtype, layout: Layout
) -> dict[int, list[BlockCall]]:
    """Return the call of each block by batch size, without the arguments that differ between batches.

    ``batches`` are one of each size.
    Calls are on the device that computes, their floating-point tensors in ``dtype``.
    """
    calls: dict[int, list[BlockCall]] = {}
    modules = [block for _, block in blocks]

    def record(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.setdefault(hidden.shape[layout.dim], []).append(layout.call(index, args, kwargs))
        if index == len(modules) - 1:
            raise Stop
        return with_hidden(layout.output, hidden)

    with around_blocks(loaded, modules):
        for batch in batches:
            with replaced_forwards(modules, record), suppress(Stop):
                loaded.model(**batch, use_cache=False)
    return {size: [call.to(loaded.device, dtype) for call in each] for size, each in calls.items()}


def record_varying(
    loaded: LoadedModel, batch: ModelInputs, blocks: Blocks, index: int, dtype: torch.dtype, layout: Layout
) -> Beside:
    """Return what block ``index`` gets that differs between batches, as ``batch`` brings it along; windows come first.

    Raises:
        InputError: an argument that is a tensor for other batches is none for this one.
    """
    found: dict[tuple[Any, ...], Tensor] = {}
    modules = [block for _, block in blocks]

    def record(at: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if at == index:
            leaves = BlockCall(args, kwargs).to(loaded.device, dtype).leaves()
            if not all(isinstance(leaves[place], Tensor) for place, _ in layout.varying[index]):
                raise InputError(
                    f"{loaded.path} calls {blocks[index][0]} with other arguments for some windows than for others, "
                    "which is not supported; use rtn or hqq, which read no text"
                )
            found.update({(place,): leaves[place].movedim(dim, 0).clone() for place, dim in layout.varying[index]})
            if layout.added[index]:
                found[ADDED] = hidden.movedim(layout.dim, 0).to(loaded.device, dtype)
            raise Stop
        return with_hidden(layout.output, hidden * 0 if layout.added[index] else hidden)

    with around_blocks(loaded, modules), replaced_forwards(modules[: index + 1], record), suppress(Stop):
        loaded.model(**batch, use_cache=False)
    return found


def first_hidden(loaded: LoadedModel, batch: ModelInputs, blocks: Blocks, layout: Layout) -> Tensor:
    """Return the hidden states ``[b, t, d]`` that enter the first block."""
    found: list[Tensor] = []

    def record(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found.append(hidden.to(loaded.device, loaded.dtype))
        raise Stop

    modules = [block for _, block in blocks]
    with around_blocks(loaded, modules), replaced_forwards(modules[:1], record), suppress(Stop):
        loaded.model(**batch, use_cache=False)
    return found[0].movedim(layout.dim, 0) if layout.dim else found[0]


def head_input(loaded: LoadedModel, batch: ModelInputs, hidden: Tensor, blocks: Blocks, layout: Layout) -> Tensor:
    """Return what the output head reads ``[b, t, d]``, of the hidden states that leave the last block.

    Raises:
        InputError: the model does not call its head.
    """
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise Stop

    handle = loaded.model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        with _after_blocks(loaded, hidden, blocks, layout), suppress(Stop):
            loaded.model(**batch, use_cache=False)
    finally:
        handle.remove()
    if not found:
        raise InputError(f"{loaded.path} does not call its output head, so that nothing shows what it reads")
    return found[0].to(loaded.device)


@contextmanager
def logits_of(
    loaded: LoadedModel, batch: ModelInputs, hidden: Tensor, blocks: Blocks, layout: Layout
) -> Iterator[Tensor]:
    """Yield the logits ``[b, t, vocabulary]`` that the model makes of the hidden states that leave the last block.

    The head of a streamed model computes on the device and in the dtype that compute.
    """
    head = loaded.model.get_output_embeddings()
    if loaded.streaming:
        weight = head.weight.to(loaded.device, loaded.dtype)
        bias = None if head.bias is None else head.bias.to(loaded.device, loaded.dtype)
        head.forward = lambda x: F.linear(x.to(loaded.device), weight, bias)  # on the instance, removed below
    try:
        with _after_blocks(loaded, hidden, blocks, layout):
            yield loaded.model(**batch, use_cache=False).logits
    finally:
        vars(head).pop("forward", None)


@contextmanager
def _after_blocks(loaded: LoadedModel, hidden: Tensor, blocks: Blocks, layout: Layout) -> Iterator[None]:
    """Let a forward of the model continue from ``hidden``, as if the last block had returned it."""
    modules = [block for _, block in blocks]
    plain = hidden.as_subclass(Tensor) if isinstance(hidden, Batch) else hidden
    plain = plain.movedim(0, layout.dim) if layout.dim else plain
    plain = plain.to("cpu" if loaded.streaming else loaded.device)  # where the final norm is

    def pass_on(index: int, before: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_hidden(layout.output, plain if index == len(modules) - 1 else before)

    with around_blocks(loaded, modules), replaced_forwards(modules, pass_on):
        yield


@contextmanager
def around_blocks(loaded: LoadedModel, blocks: list[nn.Module]) -> Iterator[None]:
    """Let the modules before the blocks compute in ``loaded.dtype`` where a streamed model has another dtype.

    Embedding tables stay as they are, and the rows that are looked up are cast. The other modules are small and are
    cast as a whole, towers of pictures or sound when they are called first; the output head is not reached.
    """
    if loaded.streaming is None or loaded.dtype == loaded.storage_dtype:
        yield
        return
    inside = {module for block in blocks for module in block.modules()} | {loaded.model.get_output_embeddings()}
    with ExitStack() as stack:

        def enter(module: nn.Module, args: Any) -> None:
            stack.enter_context(computing(loaded, module.modules()))

        for tower in beside_decoder(loaded.model):
            stack.callback(tower.register_forward_pre_hook(enter).remove)
            inside |= set(tower.modules())
        for module in loaded.model.modules():
            if isinstance(module, nn.Embedding):
                handle = module.register_forward_hook(lambda _, args, out: out.to(loaded.dtype))
                stack.callback(handle.remove)
        stack.enter_context(computing(loaded, (each for each in loaded.model.modules() if each not in inside)))
        yield
