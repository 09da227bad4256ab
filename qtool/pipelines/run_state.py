"""The folder of a run, ``<output>.partial``: a run may be killed at any moment, and the same command continues it.

    <output>.partial/qtool.lock              lock file: held by the process that writes the folder
    <output>.partial/state/lock.json         what the result depends on: recipe, model files, versions, threads
    <output>.partial/state/tokens.safetensors  calibration windows, their pictures, and which tokens are learned
    <output>.partial/state/plan.json         bit widths chosen for a budget
    <output>.partial/state/block-00003.json  figures and weight errors of a finished block, SHA-256 of its shard
    <output>.partial/state/blocks/           shards of finished blocks, if the method then trains the whole model
    <output>.partial/state/<phase>/          state of such a training, one file per process if the model is sharded
    <output>.partial/state/written.json      the checkpoint is complete: hash of its manifest, report, evaluation so far
    <output>.partial/model/                  becomes <output>: one shard for each finished block, the other tensors last
    <output>.partial/replaced/               the folder that had the name before, until the run is over

A block is finished when its ``.json`` exists, which is written after its shard is on disk. A run with another lock is
refused, and the message lists the differences. ``model`` gets its name when the checkpoint is complete. The folder
stays until evaluation, reports and exports are done too, so that the same command goes on with those.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, JsonValue
from safetensors import SafetensorError
from torch import Tensor

from qtool.checkpoints.files import SafetensorsFolder, file_hashes, write_durably, write_shard
from qtool.checkpoints.native import MANIFEST
from qtool.checkpoints.output_folder import RUN, OutputFolder, check_folder, failed, reason
from qtool.data.windows import Calibration, token_hash
from qtool.pipelines.lock import differences
from qtool.reports.records import Lock, Number, Sha256, TaskResult
from qtool.reports.report import Report
from qtool.system import distributed, progress, reading
from qtool.system.errors import InputError, RunError, listing
from qtool.training.end_to_end import TRAINING

PLAN = "plan.json"  # name of the file with the bit widths
PICTURE = "pictures."  # prefix of what a model reads of the pictures of each window, before the number of the window
WRITTEN = "written.json"  # name of the file that says that the checkpoint is complete


class BlockRecord(BaseModel):
    """The content of ``block-00003.json``, the record of a finished block."""

    sha256: Sha256  # SHA-256 of the block's shard
    figures: dict[str, Number]
    weight_errors: dict[str, Number]


class Written(BaseModel):
    """The content of ``written.json``: the checkpoint is complete, and its evaluation so far."""

    manifest: str  # SHA-256 of the checkpoint's manifest, by which its folder is known
    report: Report
    evaluation: JsonValue = None  # the section ``eval`` of the recipe that ``tasks`` belong to
    tasks: dict[str, tuple[TaskResult, ...]] = {}  # the rows of each task that was measured
    evaluated: bool = False  # the report holds the evaluation


@dataclass
class RunState:
    """The folder of a run and its files."""

    output: OutputFolder
    lock: Lock
    end_to_end: bool = False  # True if the method trains the whole model after its blocks are finished
    written: Written | None = None  # the record of the complete checkpoint, by this start of the run or an earlier one

    @property
    def partial(self) -> Path:
        """The folder of the run."""
        return self.output.partial

    @property
    def folder(self) -> Path:
        """The folder of the run's own files."""
        return self.partial / "state"

    @property
    def model(self) -> Path:
        """The folder that becomes the checkpoint."""
        return self.output.model

    @property
    def blocks(self) -> Path:
        """The folder of the shards of finished blocks."""
        return self.folder / "blocks" if self.end_to_end else self.model

    @property
    def begun(self) -> bool:
        """True if a later start would find anything to continue from."""
        return any(any(self.folder.glob(made)) for made in ("block-*.json", f"*/{TRAINING}", PLAN, WRITTEN))

    def record_file(self, index: int) -> Path:
        """Return the path of the record of a block; the block is finished if the file exists."""
        return self.folder / f"block-{index:05d}.json"

    def record(self, index: int) -> BlockRecord | None:
        """Return the record of a block; ``None`` if the block is not finished, or its record is damaged."""
        try:
            return reading.read_typed(self.record_file(index), BlockRecord, "the block is quantized again")
        except FileNotFoundError:
            return None
        except InputError as error:
            progress.note(str(error))
            return None

    def calibration(self) -> Calibration | None:
        """Return the calibration windows that an earlier start of this run kept, or ``None``."""
        file = self.folder / "tokens.safetensors"
        if not file.exists():
            return None
        kept = SafetensorsFolder(self.folder, file.name)
        if "tokens" not in kept.names:
            raise InputError(f"{file} has no tokens; pass --fresh to start over")
        pictures: dict[str, dict[str, Tensor]] = {}
        for name in sorted(name for name in kept.names if name.startswith(PICTURE)):
            window, _, key = name.removeprefix(PICTURE).partition(".")
            pictures.setdefault(window, {})[key] = kept.tensor(name)
        labels = kept.tensor("labels") if "labels" in kept.names else None
        return Calibration(kept.tensor("tokens"), labels, tuple(pictures.values()))

    def keep_tokens(
        self, tokens: Tensor, labels: Tensor | None = None, pictures: Sequence[Mapping[str, Tensor]] = ()
    ) -> None:
        """Keep the calibration windows, their labels and their pictures.

        Raises:
            InputError: an earlier start kept other windows: the calibration text has changed since.
        """
        before = self.calibration()
        if before is None:
            kept = {"tokens": tokens.cpu()} if labels is None else {"tokens": tokens.cpu(), "labels": labels.cpu()}
            for index, window in enumerate(pictures):
                kept |= {f"{PICTURE}{index:06d}.{key}": tensor.cpu() for key, tensor in window.items()}
            write_shard(kept, self.folder / "tokens.safetensors")
        elif token_hash(*before) != token_hash(tokens, labels, pictures):
            raise InputError(
                f"the calibration text has changed since {self.partial} was begun; restore it, or pass --fresh to "
                "start over"
            )

    def keep_written(self, report: Report) -> None:
        """Keep that the checkpoint is complete, with its report."""
        self._keep(Written(manifest=file_hashes(self.model, MANIFEST)[MANIFEST], report=report))

    def measured(self, evaluation: JsonValue) -> dict[str, tuple[TaskResult, ...]]:
        """Return the rows of each task that an earlier start measured for the section ``eval`` of the recipe."""
        return self.written.tasks if self.written is not None and self.written.evaluation == evaluation else {}

    def keep_task(self, evaluation: JsonValue, task: str, rows: Sequence[TaskResult]) -> None:
        """Keep the rows of a task that was measured for the section ``eval`` of the recipe."""
        assert self.written is not None
        tasks = self.measured(evaluation) | {task: tuple(rows)}
        self._keep(self.written.model_copy(update={"evaluation": evaluation, "tasks": tasks, "evaluated": False}))

    def keep_evaluated(self, evaluation: JsonValue, report: Report) -> None:
        """Keep the report with the whole evaluation."""
        assert self.written is not None
        self._keep(self.written.model_copy(update={"evaluation": evaluation, "report": report, "evaluated": True}))

    def _keep(self, written: Written) -> None:
        self.written = written
        write_durably(self.folder / WRITTEN, written.model_dump(mode="json"))

    def publish(self) -> None:
        """Give the complete checkpoint its name, if it has not got it yet."""
        if not self.is_published():
            self.output.publish()

    def is_published(self) -> bool:
        """Return whether the folder under the output's name is the checkpoint of this run."""
        return _made(self.output.path, self.written)


@contextmanager
def run_state(
    path: Path, lock: Lock, *, overwrite: bool, fresh: bool, source: Path, end_to_end: bool = False
) -> Iterator[RunState]:
    """Begin the run that writes ``path``, or continue it; after the ``with`` block its folder is removed.

    Of several processes only the first writes; the others get a state to read.

    Raises:
        InputError: ``path`` may not be written, an unfinished run there has another lock (``fresh`` removes that run),
            or another process writes there.
        RunError: the disk is full or fails; finished blocks are kept.
    """
    state = RunState(OutputFolder(path), lock, end_to_end)
    if not distributed.is_first():
        distributed.barrier()
        state.written = _read_written(state)
        distributed.barrier()
        try:
            yield state
        except (OSError, SafetensorError) as error:
            raise _stopped(state, error) from error
        return
    if fresh or not _made(path, _written(state.folder)):
        check_folder(path, overwrite=overwrite, source=source)
    begun = False
    with state.output.claim(f"another run is writing {path}; wait for it, or choose another output.path"):
        try:
            if fresh or not _made(path, _written(state.folder)):
                check_folder(path, overwrite=overwrite, source=source)  # again, now that nobody else writes
            _begin(state, fresh)
            begun = True
            distributed.barrier()
            distributed.barrier()  # the others have read the state, which may be removed from now on
            yield state
            (state.partial / RUN).unlink()  # first: without it, a later start does not take the rest for a run
            state.output.remove()
        except (OSError, SafetensorError) as error:
            raise _stopped(state, error) from error
        except BaseException:
            if not state.begun and (begun or not state.folder.exists()):
                state.output.remove()  # there is nothing to continue from
            raise


def _made(folder: Path, written: Written | None) -> bool:
    """Return whether ``folder`` is the checkpoint that ``written`` records."""
    return written is not None and _manifest_hash(folder) == written.manifest


def _manifest_hash(folder: Path) -> str | None:
    return file_hashes(folder, MANIFEST).get(MANIFEST)


def _written(folder: Path) -> Written | None:
    try:
        return Written.model_validate(reading.read_object(folder / WRITTEN))
    except (FileNotFoundError, InputError, ValueError):
        return None


def _read_written(state: RunState) -> Written | None:
    """Return what an earlier start kept of a complete checkpoint, if that is there: under its name or not yet."""
    written = _written(state.folder)
    return written if any(_made(folder, written) for folder in (state.output.path, state.model)) else None


def _stopped(state: RunState, error: Exception) -> RunError:
    path, partial = state.output.path, state.partial
    if state.is_published():
        return RunError(
            f"{path} is complete, but what follows it was not finished: {reason(error)}; run the same command again to "
            "continue"
        )
    return RunError(f"{failed(path, error)}; {partial} holds what is done; run the same command again to continue")


def _begin(state: RunState, fresh: bool) -> None:
    """Make the folders of a new run, or check that an unfinished run has the same lock."""
    file = state.partial / RUN
    before = None if fresh else read_lock(state.partial)
    if before is not None:
        _continue(state, before)
        return
    if file.exists() and not fresh:
        progress.note(f"{file} is damaged; the run starts over")
    for folder in (state.folder, state.model):
        shutil.rmtree(folder, ignore_errors=True)
    state.folder.mkdir()
    state.model.mkdir()
    state.blocks.mkdir(exist_ok=True)
    write_durably(file, state.lock.model_dump(mode="json"))


def _continue(state: RunState, before: Lock) -> None:
    """Check that the lock ``before`` of an unfinished run is the lock of this run, and say what is finished."""
    if changes := differences(before, state.lock):
        head = f"{state.partial} holds an unfinished run that differs from this one; pass --fresh to start over:"
        raise InputError(listing(head, changes))
    state.written = _read_written(state)
    if state.written is not None:
        progress.say(f"continuing the run in {state.partial}: the checkpoint is complete")
        return
    state.model.mkdir(exist_ok=True)
    count = len(list(state.folder.glob("block-*.json")))
    trainings = sorted(state.folder.glob(f"*/{TRAINING}"))
    begun = "".join(f", and training phase {file.parent.name} has begun" for file in trainings)
    progress.say(f"continuing the run in {state.partial}: {count} block(s) are finished{begun}")


def read_lock(partial: Path) -> Lock | None:
    """Return the lock that an unfinished run was begun with; ``None`` if there is none, or it is damaged."""
    try:
        return Lock.model_validate(reading.read_object(partial / RUN))
    except (FileNotFoundError, InputError, ValueError):
        return None
