"""A run that can be killed at any moment: ``<output>.partial`` holds what is done, and the same command goes on.

    <output>.partial/state/lock.json         what the result depends on: recipe, model files, versions, threads
    <output>.partial/state/block-00003.json  figures of a finished block and the SHA-256 of its shard
    <output>.partial/state/tokens.safetensors
    <output>.partial/state/plan.json         the widths that a budget came to
    <output>.partial/state/blocks/           shards of finished blocks that a later phase of the run goes on with
    <output>.partial/state/<phase>/          what a training of the whole model has reached, of a split one by process
    <output>.partial/model/                  becomes <output>: one shard for each finished block, and at last the rest

A block counts as done when its ``.json`` is there, which is written after its shard is on the disk. A run with another
lock is refused with the difference. ``model`` is renamed last, so nothing unfinished ever has the final name.
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

PLAN = "plan.json"


class BlockRecord(BaseModel):
    """``block-00003.json``: a finished block."""

    sha256: str  # of its shard
    figures: dict[str, Number]
    weight_errors: dict[str, Number]


@dataclass
class RunState:
    """The folder of a run and what lies in it."""

    partial: Path
    lock: Lock
    end_to_end: bool = False  # if set, finished blocks are an intermediate that a later phase goes on with

    @property
    def folder(self) -> Path:
        """Where the run puts its own files."""
        return self.partial / "state"

    @property
    def model(self) -> Path:
        """What becomes the checkpoint."""
        return self.partial / "model"

    @property
    def blocks(self) -> Path:
        """Where finished blocks are."""
        return self.folder / "blocks" if self.end_to_end else self.model

    @property
    def begun(self) -> bool:
        """True if anything is done that another start can go on from."""
        return any(any(self.folder.glob(made)) for made in ("block-*.json", f"*/{TRAINING}", PLAN))

    def record_file(self, index: int) -> Path:
        """The file whose presence says that a block is done."""
        return self.folder / f"block-{index:05d}.json"

    def record(self, index: int) -> BlockRecord | None:
        """The record of a block; ``None`` when it is not done."""
        try:
            return BlockRecord.model_validate_json(self.record_file(index).read_bytes())
        except (OSError, ValueError):
            return None

    def calibration(self) -> Calibration | None:
        """The calibration windows of the earlier start of this run."""
        file = self.folder / "tokens.safetensors"
        if not file.exists():
            return None
        kept = SafetensorsFolder(self.folder, file.name)
        return Calibration(kept.tensor("tokens"), kept.tensor("labels") if "labels" in kept.names else None)

    def keep_tokens(self, tokens: Tensor, labels: Tensor | None = None) -> None:
        """Keep the calibration windows, and which of their tokens are learned.

        Raises:
            InputError: they are not those of the earlier start: its text has changed since.
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
    """Begin or go on with the run that writes ``path``; at the end its checkpoint gets that name.

    Of several processes only the first one does so; the others get a state to read.

    Raises:
        InputError: ``path`` may not be written, an unfinished run there has another lock (``fresh`` removes it), or
            another process works on it.
        RunError: the disk is full or fails; what is done stays.
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
            shutil.rmtree(partial, ignore_errors=True)  # nothing is lost
        raise
    finally:
        busy.release()


def _stopped(path: Path, partial: Path, error: Exception) -> RunError:
    return RunError(f"{failed(path, error)}; {partial} holds what is done, and the same command goes on")


def _begin(state: RunState, fresh: bool) -> None:
    file = state.folder / "lock.json"
    before = None if fresh else read_lock(state.partial)
    if before is None and file.exists() and not fresh:
        progress.note(f"{file} is damaged; starting over")
    if before is not None:
        changes = differences(before, state.lock)
        if changes:
            raise InputError(listing(f"{state.partial} was begun by another run; pass --fresh to start over:", changes))
        count = len(list(state.folder.glob("block-*.json")))
        trained = "".join(f", {file.parent.name} has begun" for file in sorted(state.folder.glob(f"*/{TRAINING}")))
        progress.note(f"going on with {state.partial}: {count} block(s) are done{trained}")
        return
    shutil.rmtree(state.folder, ignore_errors=True)
    shutil.rmtree(state.model, ignore_errors=True)
    state.folder.mkdir()
    state.model.mkdir()
    state.blocks.mkdir(exist_ok=True)
    write_durably(file, state.lock.model_dump(mode="json"))


def read_lock(partial: Path) -> Lock | None:
    """The lock that an unfinished run was begun with; ``None`` where there is none, or it is damaged."""
    try:
        return Lock.model_validate_json((partial / "state" / "lock.json").read_bytes())
    except (OSError, ValueError):
        return None
