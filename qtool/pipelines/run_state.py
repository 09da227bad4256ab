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

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from qtool.checkpoints.files import Files, file_hashes, shard_name, write_durably, write_shard
from qtool.checkpoints.native import as_stored
from qtool.checkpoints.output_folder import check_folder, failed, swap
from qtool.data.windows import Calibration, token_hash
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.pipelines.lock import Lock, differences
from qtool.system import distributed, progress
from qtool.system.errors import InputError, RunError
from qtool.system.locks import hold
from qtool.training.end_to_end import TRAINING

PLAN = "plan.json"


@dataclass
class RunState:
    """The folder of a run: keeps finished blocks (``models.FinishedBlocks``) and tokens."""

    partial: Path
    lock: Lock
    end_to_end: bool = False  # whether finished blocks are only halfway
    loaded: LoadedModel | None = field(default=None, init=False)  # set when it is loaded, before any block is done

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
        """Whether anything is done that another start can go on from."""
        return any(any(self.folder.glob(made)) for made in ("block-*.json", f"*/{TRAINING}", PLAN))

    def _record(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def _shard(self, index: int) -> Path:
        assert self.loaded is not None
        return self.blocks / shard_name(index + 1, len(self.loaded.blocks()))

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """Tensors and figures of a finished block; ``None`` when it is not done, or its shard is damaged."""
        try:
            record = json.loads(self._record(index).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        shard = self._shard(index)
        if file_hashes(self.blocks, shard.name) != {shard.name: record["sha256"]}:
            progress.note(f"{shard} is not what was written; block {index} is done again")
            return None
        files = Files(self.blocks, shard.name)
        return {name: files.tensor(name) for name in files.names}, record["figures"]

    def write(self, index: int, tensors: dict[str, Tensor], figures: dict[str, float]) -> None:
        """Keep a finished block. Of several processes the first one does, and all go on when it has."""
        assert self.loaded is not None
        if distributed.is_first():
            shard = self._shard(index)
            write_shard(as_stored(tensors, packed_linears(self.loaded.model), self.loaded), shard)
            record = {"sha256": file_hashes(self.blocks, shard.name)[shard.name], "figures": figures}
            write_durably(self._record(index), record)
        distributed.wait()

    def calibration(self) -> Calibration | None:
        """The calibration windows of the earlier start of this run."""
        file = self.folder / "tokens.safetensors"
        if not file.exists():
            return None
        kept = Files(self.folder, file.name)
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
        distributed.wait()
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
        distributed.wait()
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
    before = None
    if file.exists() and not fresh:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            progress.note(f"{file} is damaged; starting over")
    if before is not None:
        changes = list(differences(before, json.loads(json.dumps(state.lock))))
        if changes:
            raise InputError(
                "\n  ".join([f"{state.partial} was begun by another run; pass --fresh to start over:", *changes])
            )
        count = len(list(state.folder.glob("block-*.json")))
        trained = "".join(f", {file.parent.name} has begun" for file in sorted(state.folder.glob(f"*/{TRAINING}")))
        progress.note(f"going on with {state.partial}: {count} block(s) are done{trained}")
        return
    shutil.rmtree(state.folder, ignore_errors=True)
    shutil.rmtree(state.model, ignore_errors=True)
    state.folder.mkdir()
    state.model.mkdir()
    state.blocks.mkdir(exist_ok=True)
    write_durably(file, state.lock)
