"""The one training loop: ``fit`` moves parameters by the gradients of a loss, and knows no model and no method.

The data of a step is the caller's choice and may depend on the step's number only, never on earlier steps: so a run
that is killed goes on from any step to the same bytes. A loss or gradient that is not finite stops the loop before it
changes a parameter. With ``validate`` the parameters end in the state with the lowest validation loss.
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
Figures = dict[str, float]


class ParamGroup(NamedTuple):
    """Parameters with one learning rate."""

    parameters: list[nn.Parameter]
    lr: float  # at the top of the schedule
    weight_decay: float = 0.0  # decoupled: each step shrinks a parameter by lr * weight_decay
    relative: bool = False  # lr is a share of the size of each number at the start; there is no weight decay


class FitResult(NamedTuple):
    """The losses of a finished training."""

    losses: list[float]  # loss of every step
    validation: list[float]  # validation losses, the first before the first step; empty without ``validate``
    best_step: int  # number of steps after which the parameters had the state that was kept
    validated_at: list[int]  # number of steps done before each validation

    def series(self, name: str) -> tuple[Series, ...]:
        """Return the losses as series called ``name``: one of steps, and one of validations if there were any."""
        steps = tuple(range(1, len(self.losses) + 1))
        losses = Series(name=name, per="step", at=steps, values=tuple(self.losses))
        if not self.validation:
            return (losses,)
        at, values = tuple(self.validated_at), tuple(self.validation)
        return losses, Series(name=name, per="validation", at=at, values=values)


class Keeper(Protocol):
    """The place where the state of a training is saved, so that a killed run goes on."""

    def read(self) -> State | None:
        """Return the state last written, or ``None`` if there is none."""

    def write(self, state: State) -> None:
        """Replace the saved state by ``state``."""


class NonFiniteError(Exception):
    """A loss or its gradient is NaN or infinite; the parameters are those of the step before. Callers handle it."""

    def __init__(self, step: int, what: str) -> None:
        """Report ``what``, the loss or the gradient, of the zero-based ``step``."""
        super().__init__(f"{what} is not finite in step {step + 1}")
        self.step = step


class SignSGD(torch.optim.Optimizer):
    """``p -= lr * sign(gradient)``, after decoupled weight decay."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        """Take groups that each have ``params``, ``lr`` and ``weight_decay``."""
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


class Lion(torch.optim.Optimizer):
    """``p -= lr * sign(b1 m + (1 - b1) g)``, then ``m = b2 m + (1 - b2) g``; decoupled weight decay before.

    The evolved sign momentum of arXiv 2302.06675, with gradient ``g`` and momentum ``m``, zero at the start.
    """

    def __init__(self, groups: list[dict[str, object]], betas: tuple[float, float]) -> None:
        """Take groups that each have ``params``, ``lr`` and ``weight_decay``."""
        super().__init__(groups, {"betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    momentum = state["momentum"]
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(torch.lerp(gradient, momentum, first).sign_(), alpha=group["lr"])
                    momentum.lerp_(gradient, 1 - second)


def windows_of_step(step: int, size: int, num_windows: int, seed: int) -> list[int]:
    """Return the windows of the zero-based ``step``; every window is used once before any is used again."""
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
    """Return the factor of the learning rates in the zero-based ``step``: rising in the warm-up, then falling."""
    warmup = round(config.warmup_share * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    gone = (step - warmup) / max(1, num_steps - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * gone)) / 2, "linear": 1 - gone, "constant": 1.0}[config.schedule]
    return config.final_share + (1 - config.final_share) * shape


def total_factor(num_steps: int, config: OptimConfig) -> float:
    """Return the sum of the factors of all steps; times the learning rate it is the travel of a parameter."""
    return sum(lr_factor(step, num_steps, config) for step in range(num_steps))


def make_optimizer(groups: Sequence[ParamGroup], config: OptimConfig) -> torch.optim.Optimizer:
    """Make the optimizer that ``config`` names.

    Raises:
        InputError: The optimizer needs a package that is not installed.
    """
    rows: list[dict[str, object]] = [
        {"params": group.parameters, "lr": group.lr, "weight_decay": group.weight_decay} for group in groups
    ]
    if config.optimizer == "signsgd":
        return SignSGD(rows)
    if config.optimizer == "lion":
        return Lion(rows, config.betas)
    if config.optimizer == "adamw":
        # fused: one pass over each parameter, its gradient and its moments
        return torch.optim.AdamW(rows, betas=config.betas, eps=config.eps, fused=True)
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
    on_step: Callable[[int, Figures], None] | None = None,
    keeper: Keeper | None = None,
    save_every: int = 0,
) -> FitResult:
    """Train the parameters of ``groups`` in place for ``num_steps``.

    ``loss_of_step(i)`` returns the loss of step ``i``, or yields the parts of its sum: the gradient of each part is
    taken before the next part is requested. With several processes each returns its share, and losses and gradients are
    averaged; of a sharded parameter each process moves its own shard. ``validate`` is called without gradients before
    the first step, after every ``validate_every`` steps and after the last; the parameters end in the state in which it
    was lowest. ``on_step`` gets the number of steps done and the ``loss``, ``learning_rate`` (the largest of the
    groups) and ``grad_norm`` (before clipping) of the last one, and ``validation_loss`` where there was a validation.
    ``keeper`` gets the whole state every ``save_every`` steps and at the end; if it holds a state at the start,
    training goes on from there.

    Raises:
        NonFiniteError: A loss or gradient is NaN or infinite.
        InputError: The optimizer needs a package that is not installed.
    """
    run, told = _Run(groups, num_steps, config), on_step or _unheard
    found = keeper.read() if keeper else None
    if found is not None:
        run.load(found)
    elif validate is not None:
        told(0, {"validation_loss": run.judge(validate)})
    while run.step < num_steps:
        figures = run.advance(loss_of_step)
        last = run.step == num_steps
        if validate is not None and (last or (validate_every and run.step % validate_every == 0)):
            figures["validation_loss"] = run.judge(validate)
        if last:
            run.end()
        if keeper is not None and (last or (save_every and run.step % save_every == 0)):
            keeper.write(run.state())
        told(run.step, figures)
    if num_steps == 0:
        run.end()
    at = validation_steps(num_steps, validate_every) if validate is not None else []
    return FitResult(run.losses, run.validation, run.best_step, at)


def _unheard(step: int, figures: Figures) -> None:
    """Take the figures of a step, and do nothing."""


def validation_steps(num_steps: int, every: int) -> list[int]:
    """Return the step counts at which ``fit`` validates: 0, multiples of ``every`` if it is set, and the last."""
    between = range(every, num_steps, every) if every else ()
    return [0, *between, num_steps] if num_steps else [0]


def _held(parameter: nn.Parameter) -> nn.Parameter:
    """Return the parameter that this process moves: the given one, or the local shard of it (shares memory)."""
    ours = distributed.local_shard(parameter)
    return parameter if ours is parameter else nn.Parameter(ours, requires_grad=parameter.requires_grad)


class _Run:
    """The state that changes while ``fit`` runs."""

    def __init__(self, groups: Sequence[ParamGroup], num_steps: int, config: OptimConfig) -> None:
        self.num_steps, self.config = num_steps, config
        self.given = [parameter for group in groups for parameter in group.parameters]
        self.groups = [group._replace(parameters=[_held(each) for each in group.parameters]) for group in groups]
        self.parameters = [parameter for group in self.groups for parameter in group.parameters]
        self.sharded = any(ours is not given for ours, given in zip(self.parameters, self.given, strict=True))
        self.sizes = [  # pairs of a parameter with relative rates, and its size at the start
            (parameter, parameter.detach().abs())
            for group in self.groups
            if group.relative
            for parameter in group.parameters
        ]
        self.optimizer = make_optimizer(self.groups, config)
        self.step = 0
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.best: list[Tensor] = []  # copies of the parameters in the best state so far, on the CPU
        self.best_step = num_steps

    @torch.enable_grad()
    def advance(self, loss_of_step: Callable[[int], Tensor | Iterable[Tensor]]) -> Figures:
        """Do one step and return its loss, learning rate and gradient norm."""
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
        distributed.all_reduce_mean(total, *([] if self.sharded else gradients))  # FSDP has averaged shards already
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
        self._move()
        self.optimizer.zero_grad()
        self.losses.append(loss)
        self.step += 1
        rate = max(group.lr for group in self.groups) * factor
        return {"loss": loss, "learning_rate": rate, "grad_norm": float(norm)}

    @torch.no_grad()
    def _move(self) -> None:
        """Move the parameters by a step of the optimizer, times the size of each number where rates are relative.

        These are zero while the optimizer moves them, so that no digit of a small step is lost beside a large number.
        """
        before = [parameter.clone() for parameter, _ in self.sizes]
        for parameter, _ in self.sizes:
            parameter.zero_()
        self.optimizer.step()
        for (parameter, size), old in zip(self.sizes, before, strict=True):
            torch.addcmul(old, size, parameter, out=parameter)

    @torch.no_grad()
    def judge(self, validate: Callable[[], float]) -> float:
        """Return the validation loss; copy the parameters if it is the lowest so far. NaN is worse than any number."""
        found = validate()
        if not self.validation or found < min((value for value in self.validation if value == value), default=math.inf):
            self.best, self.best_step = [p.detach().to("cpu", copy=True) for p in self.parameters], self.step
        self.validation.append(found)
        return found

    @torch.no_grad()
    def end(self) -> None:
        """Put the parameters into the best state."""
        for parameter, value in zip(self.parameters, self.best, strict=bool(self.best)):
            parameter.copy_(value)
        self.best = []

    def state(self) -> State:
        """Return the whole state as tensors."""
        state = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        state |= {f"best.{i}": value for i, value in enumerate(self.best)}
        for i, entries in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in entries.items()}
        state["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        bits = torch.tensor(self.validation, dtype=torch.float64).view(torch.int64)  # bits, as NaN is not equal to NaN
        state["validation"] = bits
        state["steps"] = torch.tensor([self.step, self.best_step])
        return state

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Take over ``state``."""
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
