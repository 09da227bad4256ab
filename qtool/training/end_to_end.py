"""Training of the whole model on text: windows, losses and saved state around ``fit.fit``.

A step's windows are a function of the seed and the step's number. Several processes share them and average their
gradients: the result is that of one process on the same windows, up to the order of sums. The training state is saved
beside the run, so that a run killed at any moment goes on to the same bytes.

The model runs in evaluation mode, and under autocast if its dtype is bfloat16: parameters that train are float32, and
products are those of evaluation. Gradient checkpointing is torch's own, around each block's forward. The model's switch
for it is not used, because it acts in training mode only, in which dropout is active too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtool.blocks.job import Job
from qtool.checkpoints.files import SafetensorsFolder, write_shard
from qtool.config.sections import IGNORED
from qtool.config.training import EndToEndConfig
from qtool.models.loaded import LoadedModel
from qtool.quant.trained_linear import QuantLinear
from qtool.system import distributed, progress
from qtool.system.errors import InputError, RunError
from qtool.training.fit import FitResult, NonFiniteError, ParamGroup, State, fit, windows_of_step
from qtool.training.plan import Plan, plan_of
from qtool.training.text_loss import TextLoss

TRAINING = "training.safetensors"  # file with the training state of a phase


def train_model(
    job: Job,
    teacher: nn.Module | None,
    groups: Sequence[ParamGroup],
    config: EndToEndConfig,
    *,
    phase: str,
) -> FitResult:
    """Train the parameters of ``groups`` on the text of the job, whose model must be whole in memory.

    ``teacher`` is the float model, or ``None`` for cross entropy. ``phase`` names the folder of the training state, and
    the curves in a tracker. Every window must have tokens that are learned.

    Raises:
        InputError: Validation leaves no window to train on, the dtype cannot train, or processes outnumber a batch.
        RunError: The loss or its gradient is not finite.
    """
    loaded, tokens, workspace = job.loaded, job.text, job.workspace
    training = _Training(loaded, teacher, tokens, tokens if job.labels is None else job.labels, config, job.seed)
    plan, total = training.plan, training.plan.num_steps
    for note in plan.notes:
        progress.note(note)
    layers = [module for module in loaded.model.modules() if isinstance(module, QuantLinear)]
    keeper = _Kept(workspace.phase(phase) / TRAINING, config.sharding == "full") if workspace else None
    with (
        progress.counted(f"training on {plan.num_trained} windows", total) as reach,
        _rerun_blocks(loaded, config.gradient_checkpointing),
    ):

        def loss_of_step(step: int) -> Iterator[Tensor]:
            reach(step)
            for layer in layers:
                layer.set_progress(step / total)
            return training.losses(step)

        try:
            found = fit(
                groups,
                total,
                loss_of_step,
                config.optim,
                validate=training.validate if plan.num_held_out else None,
                validate_every=plan.validate_every,
                on_step=partial(workspace.log, phase) if workspace else None,
                keeper=keeper,
                save_every=config.save_every,
            )
        except NonFiniteError as error:
            raise RunError(f"training ended: {error}; lower the learning rates, or set optim.max_grad_norm") from error
        reach(total)
    for layer in layers:
        layer.set_progress(1.0)
    if found.validation and total and not found.best_step:
        progress.note(
            f"no state had a lower validation loss than the start ({found.validation[0]:.4g}); the start is kept, so "
            "training changed nothing"
        )
    return found


def check_batch(size: int, where: str = "") -> None:
    """Refuse a step of fewer windows than processes; ``where`` is the section of the recipe.

    Raises:
        InputError: there are more processes than windows in a step.
    """
    if distributed.world_size() > size:
        raise InputError(
            f"{where}{'.' if where else ''}batch_size {size} is less than the {distributed.world_size()} processes "
            "that share a step; raise it, or start fewer processes"
        )


@dataclass
class _Training:
    """A student, its teacher, and the windows that both read."""

    loaded: LoadedModel
    teacher: nn.Module | None
    tokens: Tensor
    labels: Tensor
    config: EndToEndConfig
    seed: int
    plan: Plan = field(init=False)
    loss: TextLoss = field(init=False)

    def __post_init__(self) -> None:
        self.plan = plan_of(self.config, len(self.tokens))
        if self.loaded.dtype == torch.float16:
            raise InputError("gradients do not fit float16; set model.dtype to bfloat16 or float32")
        check_batch(self.config.batch_size)
        self.loss = TextLoss(self.loaded, self.teacher, self.config, self.tokens[: self.num_trained], self.labels)

    @property
    def num_trained(self) -> int:
        """The number of windows to train on, the first ones; the others are held out for validation."""
        return self.plan.num_trained

    def losses(self, step: int) -> Iterator[Tensor]:
        """Yield this process's parts of the loss of a step; their mean over the processes is the mean over tokens."""
        chosen = windows_of_step(step, self.config.batch_size, self.num_trained, self.seed)
        mine = torch.tensor(chosen[distributed.rank() :: distributed.world_size()])
        share = distributed.world_size() / self._num_learned(torch.tensor(chosen))
        fewest = (
            self.config.batch_size // distributed.world_size()
        )  # smallest number of windows that one process has in a step
        # all processes must split a step into the same number of parts
        for rows in mine.tensor_split(min(self.config.optim.accumulation, fewest)):
            yield self._summed(rows) * share

    def validate(self) -> float:
        """Return the mean loss of the tokens of the validation windows."""
        held = torch.arange(self.num_trained, len(self.tokens))
        total = torch.zeros((), device=self.loaded.device)
        for rows in held.split(max(1, self.config.batch_size // distributed.world_size()) * distributed.world_size()):
            mine = rows[distributed.rank() :: distributed.world_size()]
            summed = self._summed(mine if len(mine) else rows[:1])  # a split model needs all processes to run
            total += summed if len(mine) else 0
        distributed.all_reduce_mean(total)
        return float(total) * distributed.world_size() / self._num_learned(held)

    def _num_learned(self, rows: Tensor) -> int:
        """Return the number of learned tokens in windows ``rows`` ``[b]``; the first of a window is not predicted."""
        return int((self.labels[rows, 1:] != IGNORED).sum())

    def _summed(self, rows: Tensor) -> Tensor:
        """Return the summed loss of the learned tokens of windows ``rows`` ``[b]``."""
        return self.loss.summed(*(each[rows].to(self.loaded.device) for each in (self.tokens, self.labels)))


@dataclass
class _Kept:
    """The saved state of a training, in one file that is replaced as a whole; the first process writes it.

    If the model is sharded, each process also writes its shard to a file of its own, named by step and rank. The first
    process's file then holds the rest of the state; it is written once all shards exist, and says which step counts.
    """

    file: Path
    sharded: bool = False

    def read(self) -> State | None:
        """Return the state last written, or ``None`` if there is none.

        Raises:
            RunError: The shard of this process is missing.
        """
        if not self.file.exists():
            return None
        state = self._read(self.file)
        if self.sharded:
            part = self._part(state)
            if not part.exists():
                raise RunError(f"{part} is missing; all processes must see one folder. Pass --fresh to start over")
            state |= self._read(part)
        return state

    def write(self, state: State) -> None:
        """Replace the saved state by ``state``."""
        self.file.parent.mkdir(exist_ok=True)
        own = [name for name in state if self.sharded and "." in name]  # tensors that belong to a parameter
        part = self._part(state)
        if own:
            self._write({name: state[name] for name in own}, part)
            distributed.barrier()
        if distributed.is_first():
            self._write({name: tensor for name, tensor in state.items() if name not in own}, self.file)
        distributed.barrier()
        for old in set(part.parent.glob(f"*-{distributed.rank()}.safetensors")) - {part}:
            old.unlink()

    def _part(self, state: State) -> Path:
        """Return the file of this process's shard of ``state``."""
        return self.file.with_name(f"step-{int(state['steps'][0])}-{distributed.rank()}.safetensors")

    @staticmethod
    def _write(state: State, file: Path) -> None:
        write_shard({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, file)

    @staticmethod
    def _read(file: Path) -> State:
        files = SafetensorsFolder(file.parent, file.name)
        # copied, because training changes the tensors, and the file's pages may be dropped at any time
        return {name: files.tensor(name).clone() for name in files.names}


@contextmanager
def _rerun_blocks(loaded: LoadedModel, wanted: bool) -> Iterator[None]:
    """Apply gradient checkpointing if ``wanted``: keep only each block's input, and run it again for its gradient."""
    blocks = [block for _, block in loaded.blocks()] if wanted else []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
