"""Rounding and clamping to the grid: the forward is exact; the backward is that of an estimator and of a clamp.

Rounding is flat nearly everywhere, so its gradient is an invention. With ``u`` in grid units, ``C`` a clamp, ``R`` an
estimator and ``G`` the incoming gradient, the backward is ``G * R'(C(u)) * C'(u)``, whatever the scale and the zero
point (arXiv 2410.10849, in the form that can be implemented). ``R`` is one of

* ``ste``: the identity (straight through).
* ``sigmoid``: a staircase of logistic steps at the half codes, each reaching over its neighbours. It is periodic and
  smooth, its mean slope is 1 at any temperature ``T``, and ``T -> 0`` is the straight-through estimator. It is computed
  as the Fourier series of its slope, ``1 + 2 sum_m (-1)^m y_m / sinh(y_m) cos(2 pi m u)`` with ``y_m = 2 pi^2 m / T``:
  about ``T`` terms, from one cosine.
* ``sigmoid-local``: one logistic step in each code, stretched to fill it (divided by ``tanh(T / 4)``), with a kink at
  the codes; its mean slope is 1 too.
* ``dsq``: the staircase of tanh of arXiv 1908.05033, which is the step of ``sigmoid-local`` at twice the temperature.

``C`` is ``hard``, with slope one for all values that round to a code and zero beyond, or ``softclamp``: ``a + (u - a)
g(u - a) - (u - b) g(u - b)`` with a gate ``g`` of sharpness ``k``, logistic or Gaussian, between the lowest code ``a``
and the highest ``b``. It passes the ends by at most ``OVERSHOOT / k`` (``config/training.py``) and comes back. The
paper's product of two gates differs from this sum by the gates' tails only, and depends on the number of the lowest
code, which means nothing here.

The soft forward is the function ``R(C(u))`` itself, so training sees no exact code; it is used only while gradients are
recorded.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool.config.training import RoundingConfig
from qtool.system.tensors import size_for

PLAIN = RoundingConfig()  # straight-through estimator, hard clamp, hard forward
CHUNK_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 26}  # number of slopes computed at once; a CPU's caches hold 2**16


class _StraightThrough(torch.autograd.Function):
    """Value of the second argument, gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, exactly, and pass its gradient to ``x`` unchanged.

    This is a Function because the sum ``x + (value - x).detach()`` may differ from ``value`` if magnitudes differ.
    """
    result: Tensor = _StraightThrough.apply(x, value.detach())  # type: ignore[no-untyped-call]
    return result


class _ScaledGradient(torch.autograd.Function):
    """The argument itself, its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x``, and multiply its gradient by ``factor``."""
    result: Tensor = _ScaledGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return result


# -------------------------------------------------------------------------------------------------- estimators
# in all formulas f = x - floor(x), T is the temperature, p = sig(T (f - 1/2)) and p_k = sig(T (f - k - 1/2))


class Estimator(NamedTuple):
    """A smooth replacement of rounding. Both functions take grid values and a temperature, and keep shape and dtype."""

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]


def _harmonics(temperature: float, dtype: torch.dtype) -> list[float]:
    """Return ``2 (-1)^m y / sinh(y)``, ``y = 2 pi^2 m / T``, of ``m = 1 ...`` down to the precision of ``dtype``."""
    found: list[float] = []
    while True:
        m = len(found) + 1
        y = 2 * math.pi**2 * m / temperature
        size = 4 * y * math.exp(-y) / -math.expm1(-2 * y)
        if size < torch.finfo(dtype).eps / 8:
            return found
        found.append(-size if m % 2 else size)


def _clenshaw(coefficients: list[float], cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``b_1, b_2``: ``sum c_m cos(m t)`` is ``b_1 cos(t) - b_2``, ``sum c_m sin(m t)`` is ``b_1 sin(t)``."""
    first, second = torch.zeros_like(cosine), torch.zeros_like(cosine)
    for coefficient in reversed(coefficients):
        first, second = second.neg_().addcmul_(cosine, first, value=2).add_(coefficient), first
    return first, second


def _angle(x: Tensor) -> Tensor:
    """Return the position of ``x`` between codes as an angle, ``-pi .. pi``."""
    return (x - x.round()).mul_(2 * math.pi)


def periodic(x: Tensor, temperature: float) -> Tensor:
    """Sum logistic steps at all half codes: ``floor(x) + sum_k [sig(T (f - k - 1/2)) - 1[k < 0]]``."""
    coefficients = [c / (2 * math.pi * m) for m, c in enumerate(_harmonics(temperature, x.dtype), start=1)]
    angle = _angle(x)
    return _clenshaw(coefficients, angle.cos())[0].mul_(angle.sin_()).add_(x)


def periodic_slope(x: Tensor, temperature: float) -> Tensor:
    """Return the derivative of ``periodic``: ``T sum_k p_k (1 - p_k)``."""
    cosine = _angle(x).cos_()
    first, second = _clenshaw(_harmonics(temperature, x.dtype), cosine)
    return first.mul_(cosine).sub_(second).add_(1)


def local(x: Tensor, temperature: float) -> Tensor:
    """Take one logistic step in each code: ``floor(x) + 1/2 + (sig(T (f - 1/2)) - 1/2) / tanh(T / 4)``, continuous."""
    low = x.floor()
    step = (x - low).sub_(0.5).mul_(temperature / 2).tanh_()  # tanh(t / 2) is 2 sig(t) - 1
    return step.div_(2 * math.tanh(temperature / 4)).add_(low).add_(0.5)


def local_slope(x: Tensor, temperature: float) -> Tensor:
    """Return the derivative of ``local``: ``T p (1 - p) / tanh(T / 4)``."""
    p = (x - x.floor()).sub_(0.5).mul_(temperature).sigmoid_()
    return (p * (1 - p)).mul_(temperature / math.tanh(temperature / 4))


def dsq(x: Tensor, temperature: float) -> Tensor:
    """Take one step of tanh in each code: ``floor(x) + 1/2 + tanh(T (f - 1/2)) / (2 tanh(T / 2))``."""
    return local(x, 2 * temperature)


def dsq_slope(x: Tensor, temperature: float) -> Tensor:
    """Return the derivative of ``dsq``."""
    return local_slope(x, 2 * temperature)


ESTIMATORS = {
    "ste": Estimator(lambda x, temperature: x.clone(), lambda x, temperature: torch.ones_like(x)),
    "sigmoid": Estimator(periodic, periodic_slope),
    "sigmoid-local": Estimator(local, local_slope),
    "dsq": Estimator(dsq, dsq_slope),
}


# -------------------------------------------------------------------------------------------------- soft clamp


def _logistic(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logistic gate and its derivative."""
    gate = t.sigmoid()
    return gate, gate * (1 - gate)


def _gaussian(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gaussian gate and its derivative."""
    return torch.special.ndtr(t), t.square().mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))


GATES = {"logistic": _logistic, "gaussian": _gaussian}


def softclamp(x: Tensor, low: float, high: float, sharpness: float, gate: str) -> Tensor:
    """Return ``low + (x - low) g(k (x - low)) - (x - high) g(k (x - high))``, with ``k`` the sharpness."""
    ramps = [(x - end) * GATES[gate]((x - end) * sharpness)[0] for end in (low, high)]
    return ramps[0].sub_(ramps[1]).add_(low)


def softclamp_slope(x: Tensor, low: float, high: float, sharpness: float, gate: str) -> Tensor:
    """Return the derivative of ``softclamp``: ``D(k (x - low)) - D(k (x - high))`` with ``D(t) = g(t) + t g'(t)``."""
    slopes = []
    for end in (low, high):
        t = (x - end) * sharpness
        value, derivative = GATES[gate](t)
        slopes.append(value.addcmul_(t, derivative))
    return slopes[0].sub_(slopes[1])


# ----------------------------------------------------------------------------------------------- rounding and clamp


def soft_codes(grid: Tensor, low: int, high: int, config: RoundingConfig) -> Tensor:
    """Return ``R(C(grid))``, whose exact derivative is ``slope`` under ``forward: soft``."""
    estimator = ESTIMATORS[config.estimator]
    if config.clamp == "hard":
        return estimator.value(grid, config.temperature).clamp_(low, high)
    return estimator.value(softclamp(grid, low, high, config.sharpness, config.gate), config.temperature)


def slope(grid: Tensor, low: int, high: int, config: RoundingConfig) -> Tensor:
    """Return ``R'(C(u)) * C'(u)`` at ``u = grid``, in the dtype of ``grid``."""
    estimator = ESTIMATORS[config.estimator]
    if config.clamp == "hard":
        rounded = grid.round() if config.forward == "hard" else estimator.value(grid, config.temperature)
        outside = (rounded < low) | (rounded > high)
        return estimator.slope(grid, config.temperature).masked_fill_(outside, 0)
    slopes = softclamp_slope(grid, low, high, config.sharpness, config.gate)
    if config.estimator == "ste":
        return slopes
    clamped = softclamp(grid, low, high, config.sharpness, config.gate)
    return slopes.mul_(estimator.slope(clamped, config.temperature))


class _Codes(torch.autograd.Function):
    """Round and clamp; the gradient is multiplied by ``slope``. The plain case keeps only a mask for it."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, low: int, high: int, config: RoundingConfig, soft: bool) -> Tensor:
        ctx.arguments = low, high, config
        ctx.plain = config.estimator == "ste" and config.clamp == "hard"
        rounded = grid.round()
        codes = rounded.clamp(low, high)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(codes != rounded if ctx.plain else grid)
        return soft_codes(grid, low, high, config) if soft else codes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        if ctx.plain:
            return torch.where(saved, 0.0, grad), None, None, None, None  # a third faster than masked_fill
        size = size_for(saved.device, CHUNK_NUMBERS)
        product = torch.empty_like(saved, memory_format=torch.contiguous_format)
        parts = (tensor.reshape(-1).split(size) for tensor in (saved, grad, product))
        for grid, incoming, outgoing in zip(*parts, strict=True):  # in chunks: no slope is held for a whole weight
            torch.mul(incoming, slope(grid, *ctx.arguments), out=outgoing)
        return product, None, None, None, None


def round_and_clamp(grid: Tensor, low: int, high: int, config: RoundingConfig = PLAIN) -> Tensor:
    """Return the nearest code ``low .. high`` of each value of ``grid``, half to even, in the dtype of ``grid``.

    ``config`` defines the backward. With ``forward: soft`` the result is ``soft_codes``, while gradients are recorded.
    """
    soft = config.forward == "soft" and torch.is_grad_enabled()
    result: Tensor = _Codes.apply(grid, low, high, config, soft)  # type: ignore[no-untyped-call]
    return result
