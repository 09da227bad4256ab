"""Training of the whole model on text: what surrounds ``train.fit`` when all blocks learn together.

A step's windows are a function of the seed and the step's number. Several processes share them, and average their
gradients: the result is that of one process on the same windows, up to the order of sums. What training has reached is
kept beside the run, so that a run killed at any moment goes on to the same bytes.

The model runs in evaluation mode and, where its dtype is a half one, under autocast: what trains is float32, and the
product is the one that evaluation takes. Blocks are run again for their gradient by torch's own checkpointing around
each block's forward and not by the model's switch, which acts in training mode only, where dropout does too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtool.blocks.job import Job, Workspace
from qtool.checkpoints.files import SafetensorsFolder, write_shard
from qtool.config.sections import IGNORED
from qtool.config.training import EndToEndConfig
from qtool.models.loaded import LoadedModel
from qtool.quant.trained_linear import QuantLinear
from qtool.system import distributed, progress
from qtool.system.errors import InputError, RunError
from qtool.training.fit import FitResult, NonFiniteError, ParamGroup, State, fit, windows_of_step
from qtool.training.losses import CE, confidence, token_losses

TRAINING = "training.safetensors"  # what a phase has reached
CONFIDENCE_WINDOWS = 16  # that the teacher's confidence is measured on


def num_steps(config: EndToEndConfig, num_windows: int) -> int:
    """Steps of a training with so many calibration windows."""
    if config.steps is not None:
        return config.steps
    return ceil(config.epochs * (num_windows - config.validation_samples) / config.batch_size)


def train_model(
    job: Job,
    teacher: nn.Module | None,
    groups: Sequence[ParamGroup],
    config: EndToEndConfig,
    *,
    phase: str,
) -> FitResult:
    """Train the parameters of ``groups`` in the model of the job, which is whole, on its text.

    ``teacher`` is the float model, for every loss but cross entropy. ``phase`` names the folder of what is kept. Each
    window has some tokens that are learned.

    Raises:
        InputError: fewer windows than are to be kept out, or a dtype that cannot train.
        RunError: the loss is not finite.
    """
    loaded, tokens, workspace = job.loaded, job.text, job.workspace
    training = _Training(loaded, teacher, tokens, tokens if job.labels is None else job.labels, config, job.seed)
    total = num_steps(config, len(tokens))
    layers = [module for module in loaded.model.modules() if isinstance(module, QuantLinear)]
    keeper = _Kept(workspace.phase(phase) / TRAINING, config.sharding == "full") if workspace else None
    with (
        progress.counted(f"training on {training.num_trained} windows", total) as reach,
        _tracking(workspace, loaded.device, config, phase) as track,
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
                validate=training.validate if config.validation_samples else None,
                validate_every=config.validate_every,
                on_step=track,
                keeper=keeper,
                save_every=config.save_every,
            )
        except NonFiniteError as error:
            raise RunError(f"training ended: {error}; lower the learning rates, or set optim.max_grad_norm") from error
        reach(total)
    for layer in layers:
        layer.set_progress(1.0)
    return found


@dataclass
class _Training:
    """A student, its teacher, and the windows that they read."""

    loaded: LoadedModel
    teacher: nn.Module | None
    tokens: Tensor
    labels: Tensor
    config: EndToEndConfig
    seed: int
    gamma: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.num_trained < 1:
            raise InputError(
                f"validation_samples {self.config.validation_samples} of {len(self.tokens)} windows leave none to "
                "train on; lower it, or raise data.num_samples"
            )
        if self.loaded.dtype == torch.float16:
            raise InputError("gradients do not fit float16; set model.dtype to bfloat16 or float32")
        if distributed.world_size() > self.config.batch_size:
            raise InputError(
                f"batch_size {self.config.batch_size} is less than the {distributed.world_size()} processes "
                "that share a step"
            )
        assert (self.teacher is None) == (self.config.loss == CE)
        if self.config.loss == "cakld":
            self.gamma = self._confidence()

    @property
    def num_trained(self) -> int:
        """Windows to train on: all but the last ones, which are for validation."""
        return len(self.tokens) - self.config.validation_samples

    def losses(self, step: int) -> Iterator[Tensor]:
        """This process's parts of the loss of a step; over all processes their mean is that of all tokens."""
        chosen = windows_of_step(step, self.config.batch_size, self.num_trained, self.seed)
        mine = torch.tensor(chosen[distributed.rank() :: distributed.world_size()])
        share = distributed.world_size() / self._num_learned(torch.tensor(chosen))
        fewest = (
            self.config.batch_size // distributed.world_size()
        )  # of any process: all split a step into equally many parts
        for rows in mine.tensor_split(min(self.config.optim.accumulation, fewest)):
            yield self._token_losses(rows).sum() * share

    def validate(self) -> float:
        """Mean loss of the tokens of the windows that are kept out."""
        held = torch.arange(self.num_trained, len(self.tokens))
        total = torch.zeros((), device=self.loaded.device)
        for rows in held.split(max(1, self.config.batch_size // distributed.world_size()) * distributed.world_size()):
            mine = rows[distributed.rank() :: distributed.world_size()]
            losses = self._token_losses(mine if len(mine) else rows[:1])  # a split model needs all processes to run
            total += losses.sum() if len(mine) else 0
        distributed.all_reduce_mean(total)
        return float(total) * distributed.world_size() / self._num_learned(held)

    def _num_learned(self, rows: Tensor) -> int:
        """How many tokens of windows ``rows`` ``[b]`` are learned; nothing predicts the first of a window."""
        return int((self.labels[rows, 1:] != IGNORED).sum())

    def _token_losses(self, rows: Tensor) -> Tensor:
        """The loss of each learned token of windows ``rows`` ``[b]``, flat."""
        tokens, labels = (each[rows].to(self.loaded.device) for each in (self.tokens, self.labels))
        learned = (labels[:, 1:] != IGNORED).flatten()
        target = None
        if self.teacher is not None:
            with torch.no_grad():
                target = self._logits(self.teacher, tokens, learned)
        student = self._logits(self.loaded.model, tokens, learned)
        return token_losses(self.config, student, target, labels[:, 1:].flatten()[learned], self.gamma)

    def _logits(self, model: nn.Module, tokens: Tensor, learned: Tensor) -> Tensor:
        """Logits that predict the ``learned`` ones of the tokens after the first, ``[tokens, vocabulary]``."""
        device, dtype = self.loaded.device.type, self.loaded.dtype
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        logits = logits[:, :-1].flatten(0, 1)
        return logits if learned.all() else logits[learned]

    @torch.no_grad()
    def _confidence(self) -> float:
        """The teacher's mean probability of the true tokens, on a few windows."""
        assert self.teacher is not None
        found = []
        for index in range(0, self.num_trained, max(1, self.num_trained // CONFIDENCE_WINDOWS)):
            tokens, labels = (each[index : index + 1].to(self.loaded.device) for each in (self.tokens, self.labels))
            learned = (labels[:, 1:] != IGNORED).flatten()
            logits = self._logits(self.teacher, tokens, learned)
            found.append(confidence(logits, labels[:, 1:].flatten()[learned]))
        return float(torch.cat(found).mean())


@dataclass
class _Kept:
    """What a training has reached, in one file that is replaced as a whole; the first process writes it.

    Of a model that is split every process keeps its part in a file of its own, named by step and process. The first
    one's file, which then holds the rest, is written when all of those are there, and says which step counts.
    """

    file: Path
    sharded: bool = False

    def read(self) -> State | None:
        """The state last written.

        Raises:
            RunError: this process does not find its part.
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
        """Put ``state`` in the place of the one before."""
        self.file.parent.mkdir(exist_ok=True)
        own = [name for name in state if self.sharded and "." in name]  # what belongs to some parameter
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
        """The file of what this process holds of ``state``."""
        return self.file.with_name(f"step-{int(state['steps'][0])}-{distributed.rank()}.safetensors")

    @staticmethod
    def _write(state: State, file: Path) -> None:
        write_shard({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, file)

    @staticmethod
    def _read(file: Path) -> State:
        files = SafetensorsFolder(file.parent, file.name)
        # copies: the file's own pages may be dropped at any time, and training changes these
        return {name: files.tensor(name).clone() for name in files.names}


@contextmanager
def _rerun_blocks(loaded: LoadedModel, wanted: bool) -> Iterator[None]:
    """Keep of each block only its input, and run it again when its gradient is taken."""
    blocks = [block for _, block in loaded.blocks()] if wanted else []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def _tracking(
    workspace: Workspace | None, device: torch.device, config: EndToEndConfig, phase: str
) -> Iterator[Callable[[float], None]]:
    """Send each step's loss to the tracker that ``config`` names, if any; only in a run that has a workspace."""
    name, available = config.tracker, [str(each.value) for each in get_available_trackers()]
    if name == "auto":
        name = "tensorboard" if "tensorboard" in available else "none"
    elif name not in (*available, "none"):
        raise InputError(f"tracker: {name} is not installed; install it, or set tracker: none")
    if name == "none" or workspace is None or not distributed.is_first():
        yield lambda loss: None
        return
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=name, project_dir=workspace.logs)
    accelerator.init_trackers(phase)
    count = 0

    def log(loss: float) -> None:
        nonlocal count
        count += 1
        accelerator.log({"loss": loss}, step=count)

    try:
        yield log
    finally:
        accelerator.end_training()
