"""The linear whose codes are learned: each weight has a logit for every code that it may take.

In training the code of a weight is the mean ``sum_v p_v c_v`` of its candidates ``c_v``, with
``p = softmax((strength l + g) / temperature)``, ``l`` its logits and ``g`` Gumbel noise of its own: a sample of the
candidates that is differentiable, and that becomes a hard choice as the temperature falls (arXiv 1611.01144). With
``G`` the gradient of the code, that of a logit is ``strength / temperature p_v G (c_v - sum_u p_u c_u)``. Where no
gradient is recorded, the code is the candidate with the largest logit: that is the weight that is measured and packed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight
from qtool.quant.trained_linear import HALF_CODE
from qtool.system.seeds import derived_seed
from qtool.system.tensors import size_for
from qtool.training.block_training import BlockLinear

ALL_CODES = 2  # largest width at which every code is a candidate
REACH = 2  # largest distance of a candidate from the start code at more bits
CHUNK_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 25}  # number of weights whose probabilities are held at once


class Ramp(NamedTuple):
    """A number that changes linearly over a training."""

    first: float
    last: float

    def at(self, share: float) -> float:
        """Return its value after ``share`` (0 .. 1) of the training."""
        return self.first + share * (self.last - self.first)


class Draw(NamedTuple):
    """The numbers that give the probabilities of a step from the logits."""

    strength: float  # factor of the logits
    temperature: float
    seed: int  # of the Gumbel noise


def gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise of the standard Gumbel distribution, ``-log(-log(u))`` of uniform ``u``, in the shape of ``like``.

    On a CPU this takes a quarter of the time of the logarithm of ``exponential_``.
    """
    uniform = torch.empty_like(like, memory_format=torch.contiguous_format).uniform_(generator=generator)
    return uniform.log_().neg_().log_().neg_()


class Candidates(NamedTuple):
    """The codes that a weight may take: ``base + values``, without those outside the grid."""

    values: tuple[int, ...]
    base: Tensor | None  # [out, in] uint8; None: zero
    highest: int  # code of the grid

    def parts(self, logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield some rows, their logits ``[candidates, rows, in]``, masked, and the candidates as a broadcast of it."""
        rows = max(1, size_for(logits.device, CHUNK_NUMBERS) // logits.shape[2])
        values = torch.tensor(self.values, dtype=logits.dtype, device=logits.device).view(-1, 1, 1)
        for start in range(0, logits.shape[1], rows):
            part = slice(start, start + rows)
            chosen, codes = logits[:, part], values
            if self.base is not None:
                codes = values + self.base[part]
                chosen = chosen.masked_fill((codes < 0) | (codes > self.highest), -torch.inf)
            yield part, chosen, codes

    def probabilities(self, logits: Tensor, draw: Draw) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield some rows, their probabilities and candidates; the noise depends on ``draw.seed`` alone."""
        generator = torch.Generator(logits.device).manual_seed(draw.seed)
        for part, chosen, codes in self.parts(logits):
            noisy = gumbel(chosen, generator).add_(chosen, alpha=draw.strength)
            yield part, noisy.div_(draw.temperature).softmax(0), codes

    def hard(self, logits: Tensor) -> Tensor:
        """Return the candidate ``[out, in]`` with the largest logit."""
        found = torch.empty_like(logits[0])
        for part, chosen, codes in self.parts(logits):
            found[part] = codes.expand_as(chosen).gather(0, chosen.argmax(0, keepdim=True))[0]
        return found


class _SoftCodes(torch.autograd.Function):
    """The mean code of each weight. The backward draws the noise again: no probabilities are kept in between."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, candidates: Candidates, draw: Draw) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.arguments = candidates, draw
        mean = torch.empty_like(logits[0])
        for part, p, codes in candidates.probabilities(logits, draw):
            mean[part] = p.mul_(codes).sum(0)
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        candidates, draw = ctx.arguments
        found = torch.empty_like(logits)
        slope = draw.strength / draw.temperature
        for part, p, codes in candidates.probabilities(logits, draw):
            torch.sub(codes, (p * codes).sum(0), out=found[:, part])
            found[:, part].mul_(p).mul_(grad[part] * slope)
        return found, None, None


def soft_codes(logits: Tensor, candidates: Candidates, draw: Draw) -> Tensor:
    """Return the mean code ``[out, in]`` of ``logits`` ``[candidates, out, in]``, in their dtype, with gradients."""
    result: Tensor = _SoftCodes.apply(logits, candidates, draw)  # type: ignore[no-untyped-call]
    return result


class AssignmentLinear(BlockLinear):
    """A linear whose logits and scales train.

    At the start ``l_v = -(c_v - x)**2`` of a weight at ``x`` in grid units: of a weight on its code the candidates
    beside it are one below it.
    """

    def __init__(
        self,
        start: QuantizedWeight,
        position: Tensor | None,
        bias: Tensor | None,
        strength: Ramp,
        temperature: Ramp,
        num_steps: int,
        seed: int,
    ) -> None:
        """Start from ``start``; ``seed`` and the step of ``num_steps`` fix the noise.

        ``position`` ``[out, in]`` is where the weights lie in grid units; it is clamped to the cells of their codes.
        """
        codes, scale, zero_point, spec = start
        self.strength, self.temperature, self.num_steps, self.seed = strength, temperature, num_steps, seed
        self.soft = False
        super().__init__(affine.dequantize(*start), bias, spec)
        self.weight = nn.Parameter(self.weight.new_zeros(()).expand_as(self.weight), requires_grad=False)
        self.scale.data = scale.clone()
        self.zero_point = nn.Parameter(zero_point.clone(), requires_grad=False)
        place = codes.float()
        if position is not None:
            place = position.float().clamp(place - HALF_CODE, place + HALF_CODE)
        if spec.num_bits <= ALL_CODES:
            self.candidates = Candidates(tuple(range(spec.qmax + 1)), None, spec.qmax)
        else:
            self.candidates = Candidates(tuple(range(-REACH, REACH + 1)), codes, spec.qmax)
            place = place.sub_(codes)
        distance = (place - value for value in self.candidates.values)
        self.logits = nn.Parameter(torch.stack([each.square_().neg_() for each in distance]))

    def set_progress(self, share: float) -> None:
        """Move strength, temperature and noise to those of the step at ``share`` of the training."""
        step = round(share * self.num_steps)
        self.draw = Draw(self.strength.at(share), self.temperature.at(share), derived_seed(self.seed, step))

    def quantized_weight(self) -> Tensor:
        """Return the weight ``[out, in]``, float32: soft with gradients, or if none is recorded as it is packed.

        With ``soft`` it is soft in both cases.
        """
        if not (self.soft or torch.is_grad_enabled()):
            return affine.dequantize(*self.quantized)
        scale, zero_point = self.qparams()
        codes = soft_codes(self.logits, self.candidates, self.draw)
        return affine.from_codes(affine.grouped(codes, self.spec), scale, zero_point, self.spec)

    @property
    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The weight that is packed: the candidates with the largest logits."""
        codes = self.candidates.hard(self.logits).to(torch.uint8)
        return QuantizedWeight(codes, *self.qparams(), self.spec)
