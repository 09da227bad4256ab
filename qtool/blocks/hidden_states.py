"""The hidden states between two blocks: one tensor for each batch, in memory or each in a file."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor


class HiddenStates(Sequence[Tensor]):
    """A sequence of batches ``[b, t, d]``; with a folder, each is kept in a file there and mapped when it is read."""

    def __init__(self, folder: Path | None, batches: Iterable[Tensor] = ()) -> None:
        """Begin with ``batches``; keep them in memory, or in files of a temporary folder below ``folder``."""
        self._folder = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="hidden-states-")
        self._batches: list[Tensor] = []  # if on disk: tensors on the meta device, which only have shape and dtype
        self._device = torch.device("cpu")
        for batch in batches:
            self.append(batch)

    def append(self, batch: Tensor) -> None:
        """Add a batch at the end."""
        if self._folder is not None:
            self._device = batch.device
            batch.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(self._file(len(self)))
            batch = batch.to("meta")
        self._batches.append(batch)

    def _file(self, index: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{index:06d}.bin"

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch = self._batches[index]
        if self._folder is None:
            return batch
        file = self._file(index % len(self))
        data = torch.from_file(str(file), shared=False, size=batch.numel(), dtype=batch.dtype)
        return data.view(batch.shape).to(self._device)

    def like(self) -> "HiddenStates":
        """Return an empty sequence that keeps its batches in the same folder, or in memory too."""
        return HiddenStates(None if self._folder is None else Path(self._folder.name).parent)
