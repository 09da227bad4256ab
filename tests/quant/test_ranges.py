"""The search for the range of a group: what it leaves out, either sign of scales, zero points between codes."""

import pytest
import torch
from helpers.weights import w
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.quant import SCALE_BITS, QuantSpec
from qtool.quant import ranges
from qtool.quant.affine import grouped, minmax_qparams, quantize
from qtool.quant.ranges import SHRINKS, range_error, search_qparams, worthwhile


@given(
    seed=st.integers(0, 2**32 - 1),
    num_bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([1, 16, 64, -1]),
    symmetric=st.booleans(),
    norm=st.sampled_from([1.0, 2.0, 2.4, 4.0]),
    power=st.sampled_from([1, 3]),
    spread=st.floats(-7, 4),
    scale_dtype=st.sampled_from(sorted(SCALE_BITS)),
)
def test_candidates_that_are_left_out_would_not_win(
    seed: int, num_bits: int, group_size: int, symmetric: bool, norm: float, power: int, spread: float, scale_dtype: str
) -> None:
    """The grid is that of a search over all candidates, bit for bit."""
    spec = w(num_bits, group_size, symmetric, scale_dtype)
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)) ** power * 10**spread
    found = search_qparams(weight, spec, norm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "worthwhile", lambda *_: SHRINKS)
        every = search_qparams(weight, spec, norm)
    assert all(torch.equal(a, b) for a, b in zip(found, every, strict=True))


def test_few_candidates_are_left_at_eight_bits() -> None:
    """A range of 255 steps gains nothing by a large cut; one of 3 steps may."""
    assert len(worthwhile(QuantSpec(num_bits=8, group_size=-1), 576, 2.4)) < 5
    assert worthwhile(QuantSpec(num_bits=2), 64, 2.4) == SHRINKS


seeds = st.integers(0, 2**32 - 1)
norms = st.sampled_from([2.0, 2.4, 3.0])


def random(seed: int, rows: int, columns: int, power: int = 1) -> tuple[Tensor, Tensor]:
    """Return a weight, and an importance for each column."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) ** power
    return weight, torch.rand(columns, generator=generator) ** 2 + 1e-3


def error_of(weight: Tensor, grid: tuple[Tensor, Tensor], spec: QuantSpec, norm: float, importance: Tensor) -> Tensor:
    groups = grouped(weight, spec)
    return range_error(groups, *grid, spec, norm, importance.view(1, groups.shape[1], -1))


@given(seeds, st.sampled_from([2, 3, 4]), st.sampled_from([1, 3]), norms)
def test_scales_of_either_sign_are_never_worse_and_at_two_bits_much_better(
    seed: int, num_bits: int, power: int, norm: float
) -> None:
    weight, importance = random(seed, 64, 64, power)
    positive = w(num_bits, 32).model_copy(update={"negative_scales": False})
    signed = w(num_bits, 32)
    before, after = (
        error_of(weight, search_qparams(weight, spec, norm, importance), spec, norm, importance)
        for spec in (positive, signed)
    )
    assert bool((after <= before).all())
    if num_bits == 2 and power == 1:
        assert float(after.sum()) < 0.9 * float(before.sum())


@given(seeds, st.sampled_from([2, 3, 4, 8]), norms)
def test_a_mirrored_weight_has_the_mirrored_scale(seed: int, num_bits: int, norm: float) -> None:
    """Neither side of zero is preferred: the same errors, and where no two scales tie, the same codes, bit for bit."""
    weight, importance = random(seed, 8, 64)
    spec = w(num_bits, 32).model_copy(update={"negative_scales": True})
    for find in (minmax_qparams, lambda each, spec: search_qparams(each, spec, norm, importance)):
        one, other = find(weight, spec), find(-weight, spec)
        errors = [error_of(each, grid, spec, norm, importance) for each, grid in ((weight, one), (-weight, other))]
        assert torch.equal(*errors)
        alike = (one[0] == -other[0]).repeat_interleave(32, 1)  # not where both signs are equally good
        assert bool(alike.any())
        assert torch.equal(quantize(weight, *one, spec)[alike], quantize(-weight, *other, spec)[alike])


def test_a_group_on_one_side_of_zero_gets_the_extra_level_there() -> None:
    """Golden, by hand: 2 bits hold 0, 1, 2 exactly with the scale -1, and 0, -1, -2 with 1."""
    weight = torch.tensor([[0.0, 1.0, 2.0, 2.0], [0.0, -1.0, -2.0, -2.0]])
    for find in (minmax_qparams, search_qparams):
        scale, _ = find(weight, w(2, 4))
        assert scale.tolist() == [[-1.0], [1.0]]


FLOAT_ZERO = QuantSpec(num_bits=2, group_size=8, symmetric=False, float_zero=True, scale_dtype="float32")


@given(seeds, st.sampled_from([2, 3, 4]), norms, st.sampled_from(["affine", "q2_k", "q4_k"]))
def test_refined_zero_points_are_never_worse(seed: int, num_bits: int, norm: float, grid: str) -> None:
    weight, importance = random(seed, 4, 256)
    spec = FLOAT_ZERO.model_copy(update={"num_bits": num_bits, "group_size": 32})
    if grid != "affine":
        spec = QuantSpec(grid=grid).free
    refined = error_of(weight, search_qparams(weight, spec, norm, importance), spec, norm, importance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "REFINEMENTS", ())
        ends = error_of(weight, search_qparams(weight, spec, norm, importance), spec, norm, importance)
    assert bool((refined <= ends).all())
    assert float(refined.sum()) < float(ends.sum())


@pytest.mark.parametrize("norm", [2.0, 3.0])
def test_the_refined_grid_is_near_the_best_of_a_dense_grid_of_scales_and_zero_points(norm: float) -> None:
    """Brute force over 200 scales times 160 zero points: at most 4 % less error in all, where the ends leave 7 %."""
    weight, importance = random(0, 64, 8)
    found = error_of(weight, search_qparams(weight, FLOAT_ZERO, norm, importance), FLOAT_ZERO, norm, importance)
    groups, best = grouped(weight, FLOAT_ZERO), torch.full((64, 1), torch.inf)
    full = (weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)).view(1, 64, 1) / FLOAT_ZERO.qmax
    zero_points = torch.linspace(-1, 4, 160).view(-1, 1, 1).expand(-1, 64, 1)
    for share in torch.linspace(0.2, 1.2, 200):
        scales = (full * share).expand(160, -1, -1)
        errors = range_error(groups, scales, zero_points, FLOAT_ZERO, norm, importance.view(1, 1, -1))
        best = torch.minimum(best, errors.amin(0))
    assert float(found.sum()) <= 1.04 * float(best.sum())


@given(seeds, st.floats(-0.5, 0.5))
def test_a_shifted_weight_has_shifted_zero_points(seed: int, shift: float) -> None:
    """The levels of a grid with zero points between codes lie anywhere, as long as the range includes zero."""
    weight, importance = random(seed, 8, 32)
    weight[:, ::8], weight[:, 1::8] = -2.0, 2.0  # ends on both sides of zero, before and after the shift
    spec = FLOAT_ZERO
    grids = [search_qparams(each, spec, 2.0, importance) for each in (weight, weight + shift)]
    before, after = (
        error_of(weight + move, grid, spec, 2.0, importance) for move, grid in zip((0, shift), grids, strict=True)
    )
    (scale, zero_point), _ = grids
    moved = error_of(weight + shift, (scale, zero_point - shift / scale), spec, 2.0, importance)
    assert torch.allclose(moved, before, rtol=1e-3, atol=1e-4)
    assert float(after.sum()) <= 1.1 * float(before.sum())
