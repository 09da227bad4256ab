"""The hidden states that enter the next block, and how the model calls every block.

They are computed once for the first block, of the batches that this process holds (``shares.py``), and go through each
block when it is quantized.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from qtool.blocks.calls import BlockCall, Layout, first_hidden, head_input, record_calls, record_varying
from qtool.blocks.ending import Ending
from qtool.blocks.hidden_states import Beside, HiddenStates
from qtool.blocks.job import Job, ModelInputs
from qtool.blocks.layout import find_layout
from qtool.blocks.pictures import PictureFeatures
from qtool.blocks.shares import share_of
from qtool.blocks.tables import same_moment
from qtool.blocks.task import BlockTask
from qtool.models.experts import choices
from qtool.models.loaded import LoadedModel
from qtool.models.tables import unpacked
from qtool.system import distributed, progress, units

TOKENS_PER_BATCH = 2048  # tokens of a batch of windows; more are no faster on a CPU, and need more memory
PROBED_WINDOWS = 4  # windows on which the error of a block is measured


def windows_per_batch(job: Job) -> int:
    """Return the number of windows of a batch of the job's text."""
    return 1 if job.pictures else max(1, TOKENS_PER_BATCH // job.text.shape[1])


class BlockStates:
    """The hidden states that enter the next block, and the recorded calls of every block."""

    def __init__(self, job: Job, compute: torch.dtype, with_float_states: bool, shared: bool = False) -> None:
        """Compute the hidden states that enter the first block, and choose whether they are held in memory.

        With ``with_float_states``, the hidden states of the float model are kept beside those of the quantized model.
        If the text is ``shared``, each of several processes holds some of its batches.

        Raises:
            InputError: there are fewer windows than processes that share them.
        """
        loaded, tokens, workspace = job.loaded, job.text, job.workspace
        blocks = loaded.blocks()
        with nullcontext() if shared else distributed.alone():
            size, share = share_of(len(tokens), windows_per_batch(job))
        batches = job.batches(size, loaded.model.device, loaded.dtype, share.numbers)
        self._loaded, self._batches, self._blocks = loaded, batches, blocks
        self._features = PictureFeatures(loaded)
        with self._features.remembered():
            self._layout = find_layout(loaded, batches, blocks)
            self._calls = record_calls(loaded, _of_each_size(batches), blocks, compute, self._layout)
            first = first_hidden(loaded, batches[0], blocks, self._layout)
        self.ending = Ending(job, batches, blocks, self._layout, self._features)
        # the function that returns the arguments of block i that differ between batches
        self._varying = partial(_varying, loaded, batches, blocks, compute, self._layout)
        state_bytes = (
            2 * first[0].nbytes * share.num_windows * (2 if with_float_states else 1)
        )  # entering and leaving the block
        widest = max((t.weight_shape[1] * choices(loaded.model, t.linear) for t in job.targets), default=0)
        # a paused forward holds the next linear's input, the residual, and about as much again in its callers
        num_tokens = share.num_windows * tokens.shape[1]
        paused_bytes = (widest + 3 * first.shape[-1]) * compute.itemsize * num_tokens * (2 if with_float_states else 1)
        budget = workspace.memory_budget if workspace else None
        on_disk = budget is not None and state_bytes > budget
        self._pausing = budget is None or state_bytes + paused_bytes <= budget
        if on_disk:
            held = units.size(state_bytes)
            progress.note(f"hidden states take {held}, more than data.memory_budget; they are kept on disk")
        folder = workspace.scratch if workspace and on_disk else None
        self.inputs = HiddenStates(folder, chain([first], self.entering(1)), share)
        self.float_inputs = self.inputs if with_float_states else None
        if with_float_states and job.tables.floats:
            with unpacked(loaded.model, job.tables):
                self.float_inputs = HiddenStates(folder, self.entering(), share)

    def entering(self, start: int = 0) -> Iterator[Tensor]:
        """Compute the hidden states that enter the first block, of each batch from ``start`` on."""
        with self._features.remembered():
            for batch in self._batches[start:]:
                yield first_hidden(self._loaded, batch, self._blocks, self._layout)

    def at(self, index: int) -> tuple[HiddenStates, HiddenStates | None, dict[int, BlockCall], bool]:
        """Return the inputs and float inputs of block ``index``, its calls by batch size, and whether it may pause."""
        with self._features.remembered():
            for states in {id(each): each for each in (self.inputs, self.float_inputs) if each is not None}.values():
                states.bring(self._varying(index))
        return self.inputs, self.float_inputs, {size: each[index] for size, each in self._calls.items()}, self._pausing

    def of_head(self) -> tuple[HiddenStates, HiddenStates | None]:
        """Return the inputs and the float inputs of the head, after the last block, as few windows as are needed."""
        given = [self.inputs, *([] if self.float_inputs is None else [self.float_inputs])]

        def read() -> Iterator[tuple[Tensor, ...]]:
            with self._features.remembered():
                for batch, *states in zip(self._batches, *given, strict=True):
                    found = (head_input(self._loaded, batch, x, self._blocks, self._layout) for x in states)
                    yield tuple(each.flatten(0, -2) for each in found)

        made = [HiddenStates(None, (x.to(self._loaded.dtype) for x in each)) for each in same_moment(read())]
        return made[0], made[1] if len(made) > 1 else None

    def advance(self, task: BlockTask) -> None:
        """Replace the hidden states by those after the block of ``task``, which is quantized by now."""
        if self.float_inputs is not None:
            assert task.float_outputs is not None, "a method with float inputs sets the float outputs of each task"
            self.float_inputs = task.float_outputs
        self.inputs = task.outputs or task.through_counted(self.inputs)


def _of_each_size(batches: list[ModelInputs]) -> list[ModelInputs]:
    """Return one batch of each size that a block is run on."""
    sizes = {len(batch["input_ids"]): batch for batch in batches}
    if batches[0].keys() == {"input_ids"}:
        few = [batches[0]["input_ids"][:count] for count in (1, PROBED_WINDOWS)]
        sizes = {len(batch): {"input_ids": batch} for batch in few} | sizes
    return list(sizes.values())


def _varying(
    loaded: LoadedModel,
    batches: list[ModelInputs],
    blocks: list[tuple[str, nn.Module]],
    compute: torch.dtype,
    layout: Layout,
    index: int,
) -> Iterator[Beside]:
    """Yield the arguments of block ``index`` that differ between batches, for each batch."""
    if layout.varying[index] or layout.added[index]:
        for batch in batches:
            yield record_varying(loaded, batch, blocks, index, compute, layout)
