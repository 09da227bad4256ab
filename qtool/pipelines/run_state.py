"""The folder of a run, ``<output>.partial``: a run may be killed at any moment, and the same command continues it.

    <output>.partial/busy                    lock file: held by the process that writes the folder
    <output>.partial/state/lock.json         what the result depends on: recipe, model files, versions, threads
    <output>.partial/state/tokens.safetensors  calibration windows, and which of their tokens are learned
    <output>.partial/state/plan.json         bit widths chosen for a budget
    <output>.partial/state/block-00003.json  figures and weight errors of a finished block, SHA-256 of its shard
    <output>.partial/state/blocks/           shards of finished blocks, if the method then trains the whole model
    <output>.partial/state/<phase>/          state of such a training, one file per process if the model is sharded
    <output>.partial/model/                  becomes <output>: one shard for each finished block, the other tensors last

A block is finished when its ``.json`` exists, which is written after its shard is on disk. A run with another lock is
refused, and the message lists the differences. ``model`` is renamed last, so nothing unfinished has the final name.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from safetensors import SafetensorError
from torch import Tensor

from qtool.checkpoints.files import SafetensorsFolder, write_durably, write_shard
from qtool.checkpoints.output_folder import check_folder, failed, swap
from qtool.data.windows import Calibration, token_hash
from qtool.pipelines.lock import differences
from qtool.reports.records import Lock, Number
from qtool.system import distributed, progress
from qtool.system.errors import InputError, RunError, listing
from qtool.system.locks import hold
from qtool.training.end_to_end import TRAINING

PLAN = "plan.json"  # name of the file with the bit widths


class BlockRecord(BaseModel):
    """The content of ``block-00003.json``, the record of a finished block."""

    sha256: str  # SHA-256 of the block's shard
    figures: dict[str, Number]
    weight_errors: dict[str, Number]


@dataclass
class RunState:
    """The folder of a run and its files."""

    partial: Path
    lock: Lock
    end_to_end: bool = False  # True if the method trains the whole model after its blocks are finished

    @property
    def folder(self) -> Path:
        """The folder of the run's own files."""
        return self.partial / "state"

    @property
    def model(self) -> Path:
        """The folder that becomes the checkpoint."""
        return self.partial / "model"

    @property
    def blocks(self) -> Path:
        """The folder of the shards of finished blocks."""
        return self.folder / "blocks" if self.end_to_end else self.model

    @property
    def begun(self) -> bool:
        """True if a later start would find anything to continue from."""
        return any(any(self.folder.glob(made)) for made in ("block-*.json", f"*/{TRAINING}", PLAN))

    def record_file(self, index: int) -> Path:
        """Return the path of the record of a block; the block is finished if the file exists."""
        return self.folder / f"block-{index:05d}.json"

    def record(self, index: int) -> BlockRecord | None:
        """Return the record of a block; ``None`` if the block is not finished."""
        try:
            return BlockRecord.model_validate_json(self.record_file(index).read_bytes())
        except (OSError, ValueError):
            return None

    def calibration(self) -> Calibration | None:
        """Return the calibration windows that an earlier start of this run kept, or ``None``."""
        file = self.folder / "tokens.safetensors"
        if not file.exists():
            return None
        kept = SafetensorsFolder(self.folder, file.name)
        return Calibration(kept.tensor("tokens"), kept.tensor("labels") if "labels" in kept.names else None)

    def keep_tokens(self, tokens: Tensor, labels: Tensor | None = None) -> None:
        """Keep the calibration windows and their labels.

        Raises:
            InputError: an earlier start kept other windows: the calibration text has changed since.
        """
        before = self.calibration()
        if before is None:
            kept = {"tokens": tokens.cpu()} if labels is None else {"tokens": tokens.cpu(), "labels": labels.cpu()}
            write_shard(kept, self.folder / "tokens.safetensors")
        elif token_hash(*before) != token_hash(tokens, labels):
            raise InputError(
                f"the calibration text has changed since {self.partial} was begun; restore it, or pass --fresh to "
                "start over"
            )


@contextmanager
def run_state(
    path: Path, lock: Lock, *, overwrite: bool, fresh: bool, source: Path, end_to_end: bool = False
) -> Iterator[RunState]:
    """Begin the run that writes ``path``, or continue it; after the ``with`` block the checkpoint gets that name.

    Of several processes only the first writes; the others get a state to read.

    Raises:
        InputError: ``path`` may not be written, an unfinished run there has another lock (``fresh`` removes that run),
            or another process writes there.
        RunError: the disk is full or fails; finished blocks are kept.
    """
    check_folder(path, overwrite=overwrite, source=source)
    partial = path.with_name(f"{path.name}.partial")
    state = RunState(partial, lock, end_to_end)
    if not distributed.is_first():
        distributed.barrier()
        try:
            yield state
        except (OSError, SafetensorError) as error:
            raise _stopped(path, partial, error) from error
        return
    busy = hold(partial / "busy", path, f"another run is writing {path}; wait for it, or choose another output.path")
    begun = False
    try:
        _begin(state, fresh)
        begun = True
        distributed.barrier()
        yield state
        if path.exists():
            shutil.rmtree(swap(path, state.model), ignore_errors=True)
        else:
            state.model.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _stopped(path, partial, error) from error
    except BaseException:
        if begun and not state.begun:
            shutil.rmtree(partial, ignore_errors=True)  # there is nothing to continue from
        raise
    finally:
        busy.release()


def _stopped(path: Path, partial: Path, error: Exception) -> RunError:
    return RunError(f"{failed(path, error)}; {partial} holds what is done; run the same command again to continue")


def _begin(state: RunState, fresh: bool) -> None:
    """Make the folders of a new run, or check that an unfinished run has the same lock."""
    file = state.folder / "lock.json"
    before = None if fresh else read_lock(state.partial)
    if before is not None:
        _continue(state, before)
        return
    if file.exists() and not fresh:
        progress.note(f"{file} is damaged; the run starts over")
    shutil.rmtree(state.folder, ignore_errors=True)
    shutil.rmtree(state.model, ignore_errors=True)
    state.folder.mkdir()
    state.model.mkdir()
    state.blocks.mkdir(exist_ok=True)
    write_durably(file, state.lock.model_dump(mode="json"))


def _continue(state: RunState, before: Lock) -> None:
    """Check that the lock ``before`` of an unfinished run is the lock of this run, and say what is finished."""
    if changes := differences(before, state.lock):
        head = f"{state.partial} holds an unfinished run that differs from this one; pass --fresh to start over:"
        raise InputError(listing(head, changes))
    count = len(list(state.folder.glob("block-*.json")))
    trainings = sorted(state.folder.glob(f"*/{TRAINING}"))
    begun = "".join(f", and training phase {file.parent.name} has begun" for file in trainings)
    progress.note(f"continuing the run in {state.partial}: {count} block(s) are finished{begun}")


def read_lock(partial: Path) -> Lock | None:
    """Return the lock that an unfinished run was begun with; ``None`` if there is none, or it is damaged."""
    try:
        return Lock.model_validate_json((partial / "state" / "lock.json").read_bytes())
    except (OSError, ValueError):
        return None
