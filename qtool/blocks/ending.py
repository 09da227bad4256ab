"""What follows the last block: the final norm and the output head, run by the model's own code while blocks are away.

A method may so compare predictions instead of hidden states. The model's forward is run with its blocks replaced by the
hidden states that are asked about. The head of a streamed model is copied to the device that computes, and a packed
one, which reads the packed embedding, is expanded once; both are freed with the ``Ending``.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtool.blocks.calls import Blocks, Layout, around_blocks
from qtool.blocks.hidden_states import Batch
from qtool.blocks.job import Job, ModelInputs
from qtool.blocks.pictures import PictureFeatures
from qtool.models.block_calls import replaced_forwards, with_hidden
from qtool.models.readout import Readout, readout_of
from qtool.models.tables import head_of
from qtool.quant.packed_linear import PackedLinear
from qtool.system.errors import InputError

Places = Sequence[tuple[int, int]]  # batch of each window, and its row there


class Ending:
    """The end of the model of a job, after its last block."""

    def __init__(
        self, job: Job, batches: list[ModelInputs], blocks: Blocks, layout: Layout, features: PictureFeatures
    ) -> None:
        """Compute nothing yet; ``batches`` are the inputs of the model, one for each batch of hidden states."""
        self._loaded, self._tables, self._batches = job.loaded, job.tables, batches
        self._blocks, self._layout, self._features = blocks, layout, features
        self._readout: Readout | None = None
        self._heads: dict[bool, nn.Module] = {}

    @property
    def vocabulary(self) -> int:
        """The number of tokens of the embedding, which is about that of logits."""
        return self._loaded.num_embeddings

    @torch.no_grad()
    def check(self, key: str) -> None:
        """Find out how the model makes logits, once.

        Raises:
            InputError: It makes them of more than its final hidden states; ``key`` is the recipe key that needs them.
        """
        if self._readout is not None:
            return
        if head_of(self._loaded.model) is None:
            raise InputError(f"{key} needs an output head, which {self._loaded.path} does not have; leave it out")
        with self._passing(None), self._head(False):
            self._readout = readout_of(self._loaded.model, self._batches[0]["input_ids"])
        self._heads.clear()
        if self._readout is None:
            raise InputError(
                f"{key} needs a model that makes its logits of its final hidden states, which {self._loaded.path} does "
                "not; leave it out"
            )

    def hidden(self, outputs: Tensor, places: Places) -> Tensor:
        """Return the final hidden states ``[b t, d]`` of what leaves the last block for some windows, ``[b, t, d]``."""
        assert self._readout is not None, "check comes first"
        plain = outputs.as_subclass(Tensor) if isinstance(outputs, Batch) else outputs
        plain = plain.movedim(0, self._layout.dim) if self._layout.dim else plain
        with self._passing(plain.to("cpu" if self._loaded.streaming else self._loaded.device)):
            return self._readout.hidden(self._inputs(places)).flatten(0, -2).to(outputs.device)

    def logits(self, hidden: Tensor, floats: bool = False) -> Tensor:
        """Return the logits ``[n, vocabulary]`` of final hidden states ``[n, d]``; ``floats``: by the float head."""
        assert self._readout is not None, "check comes first"
        with self._head(floats):
            return self._readout.logits(hidden)

    def _inputs(self, places: Places) -> ModelInputs:
        """Return what the model reads of some windows."""
        if len(places) == 1 and len(self._batches[places[0][0]]["input_ids"]) == 1:
            return self._batches[places[0][0]]
        return {"input_ids": torch.stack([self._batches[batch]["input_ids"][row] for batch, row in places])}

    @contextmanager
    def _passing(self, hidden: Tensor | None) -> Iterator[None]:
        """Let the last block return ``hidden``, if it is given, and the others what they read."""
        modules = [block for _, block in self._blocks]

        def pass_on(index: int, before: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            last = hidden is not None and index == len(modules) - 1
            return with_hidden(self._layout.output, hidden if last and hidden is not None else before)

        with self._features.remembered(), around_blocks(self._loaded, modules), replaced_forwards(modules, pass_on):
            yield

    @contextmanager
    def _head(self, floats: bool) -> Iterator[None]:
        """Put a head that computes where hidden states are in the place of the model's, inside the ``with`` block."""
        name, own = head_of(self._loaded.model) or ("", nn.Identity())
        if floats not in self._heads:
            self._heads[floats] = self._computing(self._tables.floats.get(name, own) if floats else own)
        self._loaded.model.set_submodule(name, self._heads[floats])
        try:
            yield
        finally:
            self._loaded.model.set_submodule(name, own)

    def _computing(self, head: nn.Module) -> nn.Module:
        """Return ``head``, or a copy of it that computes on the device and in the dtype of hidden states."""
        device, dtype = self._loaded.device, self._loaded.dtype
        if isinstance(head, PackedLinear):
            dense = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
            dense.weight = nn.Parameter(head.dequantized(dtype).to(device), requires_grad=False)
            if head.bias is not None:
                dense.bias = nn.Parameter(head.bias.to(device, dtype), requires_grad=False)
            return dense
        return copy.deepcopy(head).to(device, dtype) if self._loaded.streaming else head
