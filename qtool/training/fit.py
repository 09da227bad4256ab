"""The one training loop: ``fit`` moves parameters by the gradients of a loss, and knows no model and no method.

What a step sees is the caller's choice and may depend on the step's number only, never on what was done before it: so
a run that is killed goes on from any step to the same bytes. A loss or gradient that is not finite stops the loop
before it reaches a parameter. With ``validate`` the state that did best is kept, and the parameters end as that state.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qtool.config.training import OptimConfig
from qtool.reports.records import Series
from qtool.system import distributed
from qtool.system.errors import InputError
from qtool.system.seeds import derived_seed

State = dict[str, Tensor]


class ParamGroup(NamedTuple):
    """Parameters that move at the same rate."""

    parameters: list[nn.Parameter]
    lr: float  # at the top of the schedule
    weight_decay: float = 0.0  # decoupled: each step shrinks a parameter by lr * weight_decay


class FitResult(NamedTuple):
    """What a training was."""

    losses: list[float]  # of every step
    validation: list[float]  # before the first step, and each time after; empty without ``validate``
    best_step: int  # steps after which the parameters were what they are now
    validated_at: list[int]  # steps done before each validation

    def series(self, name: str) -> tuple[Series, ...]:
        """The losses as series called ``name``: of each step, and of each validation where there were any."""
        steps = tuple(range(1, len(self.losses) + 1))
        losses = Series(name=name, per="step", at=steps, values=tuple(self.losses))
        if not self.validation:
            return (losses,)
        at, values = tuple(self.validated_at), tuple(self.validation)
        return losses, Series(name=name, per="validation", at=at, values=values)


class Keeper(Protocol):
    """Where the state of a training is kept, so that a killed run goes on."""

    def read(self) -> State | None:
        """The state last written."""

    def write(self, state: State) -> None:
        """Put ``state`` in the place of the one before."""


class NonFiniteError(Exception):
    """A loss or its gradient is NaN or infinite; the parameters are those of the step before. For callers to answer."""

    def __init__(self, step: int, what: str) -> None:
        """``what`` was found in the zero-based ``step``."""
        super().__init__(f"{what} is not finite in step {step + 1}")
        self.step = step


class SignSGD(torch.optim.Optimizer):
    """``p -= lr * sign(gradient)``, after decoupled weight decay."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        """Each group has ``params``, ``lr`` and ``weight_decay``."""
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


def windows_of_step(step: int, size: int, num_windows: int, seed: int) -> list[int]:
    """Which windows the zero-based ``step`` sees; every window comes once before any comes again."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, num_windows)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
            orders[epoch] = torch.randperm(num_windows, generator=generator).tolist()
        chosen.append(orders[epoch][place])
    return chosen


def lr_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """What the learning rates are multiplied by in the zero-based ``step``: up in the warm-up, then down."""
    warmup = round(config.warmup_share * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    gone = (step - warmup) / max(1, num_steps - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * gone)) / 2, "linear": 1 - gone, "constant": 1.0}[config.schedule]
    return config.final_share + (1 - config.final_share) * shape


def total_factor(num_steps: int, config: OptimConfig) -> float:
    """Sum of the factors of all steps: an Adam step moves a parameter by about the rate, so this is its travel."""
    return sum(lr_factor(step, num_steps, config) for step in range(num_steps))


def make_optimizer(groups: Sequence[ParamGroup], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names.

    Raises:
        InputError: it needs a package that is not installed.
    """
    rows: list[dict[str, object]] = [
        {"params": group.parameters, "lr": group.lr, "weight_decay": group.weight_decay} for group in groups
    ]
    if config.optimizer == "signsgd":
        return SignSGD(rows)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(rows, betas=config.betas, eps=config.eps)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError(
            "optimizer adamw8bit needs bitsandbytes, which is not installed; install it, or use adamw"
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(rows, betas=config.betas, eps=config.eps)
    return optimizer


def fit(
    groups: Sequence[ParamGroup],
    num_steps: int,
    loss_of_step: Callable[[int], Tensor | Iterable[Tensor]],
    config: OptimConfig,
    *,
    validate: Callable[[], float] | None = None,
    validate_every: int = 0,
    on_step: Callable[[float], None] | None = None,
    keeper: Keeper | None = None,
    save_every: int = 0,
) -> FitResult:
    """Train the parameters of ``groups`` in place for ``num_steps``.

    ``loss_of_step(i)`` gives the loss of step ``i``, or the parts that it is the sum of, one by one: each part's
    gradient is taken before the next is asked for. Of several processes each gives its share, and losses and gradients
    are averaged; of a parameter that is split over them each moves, and keeps, its part. ``validate`` is called without
    gradients before the first step, after every ``validate_every`` steps and after the last; the parameters end as they
    were when it was lowest.
    ``on_step`` gets each loss. ``keeper`` gets the whole state every ``save_every`` steps and at the end, and training
    goes on from what it holds.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite.
        InputError: the optimizer needs a package that is not installed.
    """
    run = _Run(groups, num_steps, config)
    found = keeper.read() if keeper else None
    if found is not None:
        run.load(found)
    elif validate is not None:
        run.judge(validate)
    while run.step < num_steps:
        loss = run.advance(loss_of_step)
        last = run.step == num_steps
        if validate is not None and (last or (validate_every and run.step % validate_every == 0)):
            run.judge(validate)
        if last:
            run.end()
        if keeper is not None and (last or (save_every and run.step % save_every == 0)):
            keeper.write(run.state())
        if on_step is not None:
            on_step(loss)
    if num_steps == 0:
        run.end()
    at = validation_steps(num_steps, validate_every) if validate is not None else []
    return FitResult(run.losses, run.validation, run.best_step, at)


def validation_steps(num_steps: int, every: int) -> list[int]:
    """The numbers of steps after which ``fit`` validates: 0, multiples of ``every`` if it is set, and the last."""
    between = range(every, num_steps, every) if every else ()
    return [0, *between, num_steps] if num_steps else [0]


def _held(parameter: nn.Parameter) -> nn.Parameter:
    """What moves in this process: the parameter, or the part of it that is here, in the same memory."""
    ours = distributed.local_shard(parameter)
    return parameter if ours is parameter else nn.Parameter(ours, requires_grad=parameter.requires_grad)


class _Run:
    """Everything that changes while ``fit`` is at work."""

    def __init__(self, groups: Sequence[ParamGroup], num_steps: int, config: OptimConfig) -> None:
        self.num_steps, self.config = num_steps, config
        self.given = [parameter for group in groups for parameter in group.parameters]
        self.groups = [group._replace(parameters=[_held(each) for each in group.parameters]) for group in groups]
        self.parameters = [parameter for group in self.groups for parameter in group.parameters]
        self.sharded = any(ours is not given for ours, given in zip(self.parameters, self.given, strict=True))
        self.optimizer = make_optimizer(self.groups, config)
        self.step = 0
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.best: list[Tensor] = []  # copies of the parameters, on the CPU
        self.best_step = num_steps

    @torch.enable_grad()
    def advance(self, loss_of_step: Callable[[int], Tensor | Iterable[Tensor]]) -> float:
        """Do one step; returns its loss."""
        parts = loss_of_step(self.step)
        total: Tensor | None = None
        for part in [parts] if isinstance(parts, Tensor) else parts:
            part.backward()
            total = part.detach() if total is None else total + part.detach()
        assert total is not None, "a step without a loss"
        for ours, given in zip(self.parameters, self.given, strict=True):
            if ours is not given and given.grad is not None:
                ours.grad, given.grad = distributed.local_shard(given.grad), None
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        distributed.all_reduce_mean(total, *([] if self.sharded else gradients))  # those of parts are averages already
        loss, norm = float(total), torch.nn.utils.get_total_norm(gradients)
        if self.sharded:
            norm = distributed.all_reduce_sum(norm.square()).sqrt()
        for name, value in (("the loss", loss), ("the gradient", float(norm))):
            if not math.isfinite(value):
                self.optimizer.zero_grad()
                raise NonFiniteError(self.step, name)
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        factor = lr_factor(self.step, self.num_steps, self.config)
        for group, row in zip(self.groups, self.optimizer.param_groups, strict=True):
            row["lr"] = group.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss)
        self.step += 1
        return loss

    @torch.no_grad()
    def judge(self, validate: Callable[[], float]) -> None:
        """Measure, and keep the parameters when they are better than all before; NaN is worse than anything."""
        found = validate()
        if not self.validation or found < min((value for value in self.validation if value == value), default=math.inf):
            self.best, self.best_step = [p.detach().to("cpu", copy=True) for p in self.parameters], self.step
        self.validation.append(found)

    @torch.no_grad()
    def end(self) -> None:
        """Leave the best state behind."""
        for parameter, value in zip(self.parameters, self.best, strict=bool(self.best)):
            parameter.copy_(value)
        self.best = []

    def state(self) -> State:
        """All of it as tensors."""
        state = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        state |= {f"best.{i}": value for i, value in enumerate(self.best)}
        for i, entries in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in entries.items()}
        state["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        bits = torch.tensor(self.validation, dtype=torch.float64).view(torch.int64)  # a NaN is not equal to itself
        state["validation"] = bits
        state["steps"] = torch.tensor([self.step, self.best_step])
        return state

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Be what ``state`` says."""
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(state[f"parameter.{i}"])
        self.best = [state[f"best.{i}"] for i in range(len(self.parameters)) if f"best.{i}" in state]
        whole = self.optimizer.state_dict()
        whole["state"] = {}
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, entry = rest.partition(".")
                whole["state"].setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict(whole)
        self.losses, self.validation = state["losses"].tolist(), state["validation"].view(torch.float64).tolist()
        self.step, self.best_step = state["steps"].tolist()
