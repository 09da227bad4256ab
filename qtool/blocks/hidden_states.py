"""The hidden states between two blocks: one tensor for each batch, in memory or each in a file.

Some architectures give a block more that belongs to its windows: inputs made from the tokens, and keys and values of
earlier blocks. Hidden states of such a model are ``Batch``es, which bring those tensors along.

Of several processes each holds some batches (``shares.py``); indices count those that are held, and ``share`` has their
numbers in the whole text.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from qtool.blocks.shares import Share

Beside = Mapping[tuple[Any, ...], Tensor]  # tensors [b, ...] by a name that ``calls.py`` chooses


class Batch(Tensor):
    """Hidden states ``[b, ...]`` with other tensors of the same windows; what is computed from them is a plain tensor.

    A slice of windows is a batch again. ``joined`` puts batches together.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as nn.Parameter has it
    beside: Beside

    @classmethod
    def of(cls, hidden: Tensor, beside: Beside) -> "Batch":
        """Return ``hidden``, not copied, with the tensors ``beside`` it."""
        batch = hidden.as_subclass(cls)
        batch.beside = beside
        return batch

    def __getitem__(self, key: Any) -> Tensor:
        found: Tensor = super().__getitem__(key)
        if not isinstance(key, slice):
            return found
        return Batch.of(found, {name: tensor[key] for name, tensor in self.beside.items()})


def beside_of(hidden: Tensor) -> Beside:
    """Return the tensors that hidden states bring along."""
    return hidden.beside if isinstance(hidden, Batch) else {}


def joined(batches: Sequence[Tensor]) -> Tensor:
    """Return several batches as one."""
    if len(batches) == 1:
        return batches[0]
    whole = torch.cat(list(batches))
    names = beside_of(batches[0])
    return Batch.of(whole, {n: torch.cat([beside_of(b)[n] for b in batches]) for n in names}) if names else whole


class HiddenStates(Sequence[Tensor]):
    """A sequence of batches ``[b, t, d]``; with a folder, each is kept in a file there and mapped when it is read."""

    def __init__(self, folder: Path | None, batches: Iterable[Tensor] = (), share: Share | None = None) -> None:
        """Begin with ``batches``; keep them in memory, or in files of a temporary folder below ``folder``.

        ``share`` says which batches of the text they are; ``None``: all.
        """
        self._folder, self._share = None, share
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="hidden-states-")
        self._batches: list[Tensor] = []  # if on disk: tensors on the meta device, which only have shape and dtype
        self._beside: list[Beside] = []  # the other tensors of each batch (``beside_of``), held like ``_batches``
        self._arguments: list[Beside] = []
        self._device = torch.device("cpu")
        for batch in batches:
            self.append(batch)

    @property
    def share(self) -> Share:
        """The batches of the text that are held here."""
        return self._share or Share(tuple(batch.shape[0] for batch in self._batches), tuple(range(len(self))))

    def append(self, batch: Tensor) -> None:
        """Add a batch at the end."""
        index = len(self)
        self._device = batch.device
        self._beside.append({n: self._keep(x, index, i) for i, (n, x) in enumerate(beside_of(batch).items(), 1)})
        self._batches.append(self._keep(batch, index))

    def bring(self, arguments: Iterable[Beside]) -> None:
        """Give each batch the tensors that it brings to the next block, in place of those for the block before it."""
        self._arguments = [
            {n: self._keep(x, index, -i) for i, (n, x) in enumerate(each.items(), 1)}
            for index, each in enumerate(arguments)
        ]

    def _keep(self, tensor: Tensor, index: int, part: int = 0) -> Tensor:
        """Return what is held of a tensor: itself, or, if it goes to disk, a tensor on the meta device."""
        if self._folder is None:
            return tensor
        tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(self._file(index, part))
        return tensor.to("meta")

    def _read(self, kept: Tensor, index: int, part: int = 0) -> Tensor:
        if self._folder is None:
            return kept
        data = torch.from_file(str(self._file(index, part)), shared=False, size=kept.numel(), dtype=kept.dtype)
        return data.view(kept.shape).to(self._device)

    def _file(self, index: int, part: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / (f"{index:06d}.{part}.bin" if part else f"{index:06d}.bin")

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        kept, index = self._batches[index], index % len(self)
        hidden = self._read(kept, index)
        beside = {n: self._read(x, index, i) for i, (n, x) in enumerate(self._beside[index].items(), 1)}
        if self._arguments:
            beside |= {n: self._read(x, index, -i) for i, (n, x) in enumerate(self._arguments[index].items(), 1)}
        return Batch.of(hidden, beside) if beside else hidden

    def window_shape(self, index: int) -> torch.Size:
        """Return the shape ``[t, d]`` of a window of the batch ``index``, which is not read."""
        return self._batches[index].shape[1:]

    def like(self) -> "HiddenStates":
        """Return an empty sequence that keeps its batches in the same folder, or in memory too."""
        return HiddenStates(None if self._folder is None else Path(self._folder.name).parent, share=self._share)
