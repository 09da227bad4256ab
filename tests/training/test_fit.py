"""The training loop against torch's own optimizers and closed forms, and that it goes on from any step."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qtool.config.training import OptimConfig, TrainedConfig
from qtool.system.errors import InputError
from qtool.training.fit import FitResult, NonFiniteError, ParamGroup, fit, lr_factor, total_factor

PLAIN = OptimConfig(schedule="constant")
TARGET = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def start() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))


def losses(w: nn.Parameter) -> Callable[[int], Tensor]:
    """Return a loss that has another batch in each step."""

    def loss_of_step(step: int) -> Tensor:
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        return (x @ w.T - TARGET).square().mean()

    return loss_of_step


def train(
    num_steps: int, config: OptimConfig = PLAIN, lr: float = 0.05, **options: Any
) -> tuple[nn.Parameter, FitResult]:
    w = start()
    return w, fit([ParamGroup([w], lr)], num_steps, losses(w), config, **options)


class Memory:
    """Keeps the last state, as a file would."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def read(self) -> dict[str, Tensor] | None:
        return self.kept[-1] if self.kept else None

    def write(self, state: dict[str, Tensor]) -> None:
        self.kept.append({name: tensor.clone() for name, tensor in state.items()})


def test_adamw_moves_as_torchs_own() -> None:
    config = OptimConfig(schedule="linear", final_share=0.0, betas=(0.8, 0.95), eps=1e-6)
    a, b = start(), start()
    fit([ParamGroup([a], 0.05, 0.1), ParamGroup([b], 0.01)], 5, lambda i: losses(a)(i) + losses(b)(i), config)
    x, y = start(), start()
    own = torch.optim.AdamW(
        [{"params": [x], "lr": 0.05, "weight_decay": 0.1}, {"params": [y], "lr": 0.01, "weight_decay": 0.0}],
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 1 - step / 5)
    for i in range(5):
        own.zero_grad()
        (losses(x)(i) + losses(y)(i)).backward()
        own.step()
        schedule.step()
    assert torch.equal(a, x)
    assert torch.equal(b, y)


def test_signsgd_moves_by_the_rate_itself() -> None:
    w = start()
    before = w.detach().clone()
    loss_of_step = losses(w)
    gradient = torch.autograd.grad(loss_of_step(0), w)[0]
    fit([ParamGroup([w], 0.125, 0.5)], 1, loss_of_step, OptimConfig(optimizer="signsgd"))
    assert torch.allclose(w, before * (1 - 0.125 * 0.5) - 0.125 * gradient.sign())


def test_lion_is_its_closed_form() -> None:
    w = start()
    expected, momentum = w.detach().double(), torch.zeros_like(w).double()
    loss_of_step = losses(w)
    seen = []

    def recorded(step: int) -> Tensor:
        loss = loss_of_step(step)
        seen.append(torch.autograd.grad(loss, w, retain_graph=True)[0].double())
        return loss

    config = OptimConfig(optimizer="lion", betas=(0.9, 0.6), schedule="constant")
    fit([ParamGroup([w], 0.125, 0.5)], 6, recorded, config)
    for gradient in seen:
        expected = expected * (1 - 0.125 * 0.5) - 0.125 * (0.9 * momentum + 0.1 * gradient).sign()
        momentum = 0.6 * momentum + 0.4 * gradient
    assert any(bool((a.sign() != b.sign()).any()) for a, b in pairwise(seen))
    assert torch.allclose(w.double(), expected, atol=1e-5)


def test_an_optimizer_that_is_not_installed_is_named() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="adamw8bit needs bitsandbytes"):
            train(1, OptimConfig(optimizer="adamw8bit"))


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_schedules_are_their_closed_forms(num_steps: int, warmup_share: float, final: float) -> None:
    warmup = round(warmup_share * num_steps)
    for step in range(num_steps):
        gone = (step - warmup) / max(1, num_steps - warmup)
        for name, shape in (("cosine", 0.5 + 0.5 * math.cos(math.pi * gone)), ("linear", 1 - gone), ("constant", 1.0)):
            config = OptimConfig(schedule=name, warmup_share=warmup_share, final_share=final)
            expected = (step + 1) / warmup if step < warmup else final + (1 - final) * shape
            assert lr_factor(step, num_steps, config) == pytest.approx(expected)


def test_a_schedule_tells_how_far_parameters_travel() -> None:
    """The gradient's sign never changes, so neither do Adam's steps."""
    w = nn.Parameter(torch.zeros(3))
    config = OptimConfig(warmup_share=0.2, final_share=0.1, eps=1e-12)
    fit([ParamGroup([w], 0.01)], 40, lambda step: -w.sum(), config)
    assert w.detach().tolist() == pytest.approx([0.01 * total_factor(40, config)] * 3, rel=1e-3)


@pytest.mark.parametrize("num_steps", [0, 4])
def test_no_steps_or_no_rate_change_nothing(num_steps: int) -> None:
    w, found = train(num_steps, lr=0.05 if num_steps == 0 else 0.0)
    assert torch.equal(w, start())
    assert len(found.losses) == num_steps


def test_training_lowers_the_loss_and_each_step_is_told() -> None:
    told: list[dict[str, float]] = []
    _, found = train(40, on_step=lambda step, figures: told.append(figures))
    assert [figures["loss"] for figures in told] == found.losses
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert (found.validation, found.best_step) == ([], 40)


def test_parts_add_up_to_one_batch() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))
    made: list[int] = []

    def parts(w: nn.Parameter, sizes: list[int]) -> Iterator[Tensor]:
        for rows in x.split(sizes):
            made.append(len(rows))
            yield rows.matmul(w.T).square().sum() / len(x)
            assert w.grad is not None, "the next part was made before the gradient of this one was taken"

    whole, cut = start(), start()
    one = fit([ParamGroup([whole], 0.05)], 3, lambda i: parts(whole, [8]), PLAIN)
    four = fit([ParamGroup([cut], 0.05)], 3, lambda i: parts(cut, [1, 3, 2, 2]), PLAIN)
    assert torch.allclose(whole, cut, atol=1e-6)
    assert one.losses == pytest.approx(four.losses)
    assert made[-4:] == [1, 3, 2, 2]


def test_long_gradients_are_cut() -> None:
    w = start()
    seen: list[float] = []
    w.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.norm())))
    config = OptimConfig(optimizer="adamw", schedule="constant", max_grad_norm=0.01, eps=1.0)
    before = w.detach().clone()
    fit([ParamGroup([w], 1.0)], 1, lambda i: 100 * losses(w)(i), config)
    assert seen[0] > 1
    # with eps far above the root, AdamW's step is about the gradient itself
    assert float((w.detach() - before).norm()) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_any_parameter_moves(bad: float) -> None:
    w = start()
    reached: list[Tensor] = []

    def loss_of_step(step: int) -> Tensor:
        if step == 2:
            reached.append(w.detach().clone())
            return losses(w)(step) * bad
        return losses(w)(step)

    with pytest.raises(NonFiniteError, match="the loss is not finite in step 3") as found:
        fit([ParamGroup([w], 0.05)], 5, loss_of_step, PLAIN)
    assert found.value.step == 2
    assert torch.equal(w, reached[0])


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    w = nn.Parameter(torch.zeros(2))
    with pytest.raises(NonFiniteError, match="the gradient"):
        fit([ParamGroup([w], 0.05)], 1, lambda i: w.square().sum().sqrt(), PLAIN)
    assert torch.equal(w, torch.zeros(2))


def test_the_best_state_is_restored() -> None:
    w = start()
    states: list[Tensor] = []

    def validate() -> float:
        assert not torch.is_grad_enabled()
        states.append(w.detach().clone())
        return [3.0, math.nan, 1.0, 2.0][len(states) - 1]

    found = fit([ParamGroup([w], 0.05)], 5, losses(w), PLAIN, validate=validate, validate_every=2)
    assert found.validation == pytest.approx([3.0, math.nan, 1.0, 2.0], nan_ok=True)  # at 0, 2, 4 and the end
    assert found.best_step == 4
    assert torch.equal(w, states[2])
    assert not torch.equal(states[2], states[3])


def test_a_training_that_only_harms_leaves_the_start() -> None:
    worse = iter(range(10))
    w, found = train(4, validate=lambda: float(next(worse)), validate_every=1)
    assert torch.equal(w, start())
    assert found.best_step == 0


@pytest.mark.parametrize("optimizer", ["adamw", "signsgd", "lion"])
@pytest.mark.parametrize("stop", [0, 2, 3, 6])
def test_it_goes_on_from_what_was_kept_to_the_same_bits(optimizer: str, stop: int) -> None:
    config = OptimConfig(optimizer=optimizer, warmup_share=0.3)

    def run(keeper: Memory, until: int = 7) -> tuple[nn.Parameter, FitResult]:
        w = start()
        done = losses(w)

        def loss_of_step(step: int) -> Tensor:
            if step == until:
                raise KeyboardInterrupt
            return done(step)

        def validate() -> float:
            return float(w.detach().abs().sum())

        found = fit(
            [ParamGroup([w], 0.05)],
            7,
            loss_of_step,
            config,
            validate=validate,
            validate_every=2,
            keeper=keeper,
            save_every=1,
        )
        return w, found

    whole, expected = run(Memory())
    keeper = Memory()
    with pytest.raises(KeyboardInterrupt):
        run(keeper, until=stop)
    w, found = run(keeper)
    assert torch.equal(w, whole)
    assert found == expected
    again, found = run(keeper, until=0)  # all is done: no step is asked for
    assert torch.equal(again, whole)
    assert found == expected


def test_a_section_given_half_keeps_its_methods_own_defaults() -> None:
    class Config(TrainedConfig):
        name: str = "some"
        optim: OptimConfig = OptimConfig(schedule="linear", max_grad_norm=1.0)

    chosen = Config(optim={"betas": (0.9, 0.95)}).optim
    assert (chosen.schedule, chosen.max_grad_norm, chosen.betas) == ("linear", 1.0, (0.9, 0.95))


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(4, 3, [0, 3, 4]), (4, 2, [0, 2, 4]), (4, 0, [0, 4]), (4, 1, [0, 1, 2, 3, 4]), (4, 9, [0, 4]), (0, 3, [0])],
)
def test_validations_stand_at_their_steps(steps: int, every: int, expected: list[int]) -> None:
    called = iter(range(100))
    _, found = train(steps, validate=lambda: float(next(called)), validate_every=every)
    assert found.validated_at == expected
    assert len(found.validation) == len(expected)
    by_step, *by_validation = found.series("loss")
    assert (by_step.per, by_step.at) == ("step", tuple(range(1, steps + 1)))
    assert [(each.per, each.at) for each in by_validation] == [("validation", tuple(expected))]
