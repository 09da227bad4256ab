"""The workspace of a run: finished blocks, training states and hidden states, in the folder of the run.

This is the ``Workspace`` that a method sees (``blocks/job.py``); ``run_state.py`` has the layout of the folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from qtool.blocks.job import FinishedBlock
from qtool.checkpoints.files import SafetensorsFolder, file_hashes, shard_name, write_durably, write_shard
from qtool.checkpoints.native import as_stored
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.pipelines.run_state import BlockRecord, RunState
from qtool.pipelines.tracking import NO_TRACKER, Tracker
from qtool.system import distributed, progress


@dataclass(frozen=True)
class RunWorkspace:
    """The ``blocks.job.Workspace`` of a run that quantizes ``loaded``."""

    state: RunState
    loaded: LoadedModel
    memory_budget: int  # bytes
    num_parts: int  # the number of blocks, and one more for a head that is quantized by itself
    tracker: Tracker = NO_TRACKER  # of the first process

    @property
    def scratch(self) -> Path:
        """Folder for hidden states that do not fit into memory."""
        return self.state.folder

    def log(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of a step of ``phase`` to the tracker."""
        self.tracker.log(phase, step, figures)

    def phase(self, name: str) -> Path:
        """Return the folder of the state of the training phase ``name``."""
        return self.state.folder / name

    def _shard(self, index: int) -> Path:
        return self.state.blocks / shard_name(index + 1, self.num_parts)

    def read(self, index: int) -> FinishedBlock | None:
        """Return a finished block; ``None`` if it is not finished, or its shard is damaged."""
        record = self.state.record(index)
        if record is None:
            return None
        shard = self._shard(index)
        if file_hashes(shard.parent, shard.name) != {shard.name: record.sha256}:
            what = f"block {index}" if index < len(self.loaded.blocks()) else "the head"
            progress.note(f"{shard} has changed since it was written; {what} is quantized again")
            return None
        files = SafetensorsFolder(shard.parent, shard.name)
        return FinishedBlock({name: files.tensor(name) for name in files.names}, record.figures, record.weight_errors)

    def write(self, index: int, block: FinishedBlock) -> None:
        """Keep a finished block. Of several processes the first one writes, and the others wait for it."""
        if distributed.is_first():
            shard = self._shard(index)
            write_shard(as_stored(block.tensors, packed_linears(self.loaded.model), self.loaded), shard)
            sha256 = file_hashes(shard.parent, shard.name)[shard.name]
            record = BlockRecord(sha256=sha256, figures=block.figures, weight_errors=block.weight_errors)
            write_durably(self.state.record_file(index), record.model_dump(mode="json"))
            self.tracker.log("blocks", index, block_figures(block))
        distributed.barrier()


def block_figures(block: FinishedBlock) -> dict[str, float]:
    """Return the numbers of a block for a tracker: its figures but those of single experts, and its weight error."""
    figures = {name: value for name, value in block.figures.items() if "/" not in name}
    if block.weight_errors:
        figures["weight_error"] = fmean(block.weight_errors.values())
    return figures
