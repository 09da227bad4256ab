"""Sums of ``x^T x`` over calibration inputs, for Hessians and principal directions."""

from collections.abc import Iterator

from torch import Tensor

PART = 256  # columns of a matrix that is worked on in its place


def parts(size: int, width: int) -> Iterator[slice]:
    """``0 .. size`` in slices of ``width``; the last may be shorter."""
    return (slice(start, min(start + width, size)) for start in range(0, size, width))


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add the lower triangle of ``x^T x`` to ``total`` ``[in, in]``; what is above it is not to be used."""
    for part in parts(len(total), max(len(total) // 4, 128)):
        total[part, : part.stop].addmm_(x[:, part].T, x[:, : part.stop])


def mirror(matrix: Tensor) -> None:
    """Make ``matrix`` symmetric: what is below the diagonal goes above it, without a second matrix."""
    for part in parts(len(matrix), PART):
        matrix[: part.start, part] = matrix[part, : part.start].T
        lower = matrix[part, part].tril()
        matrix[part, part] = lower + lower.tril(-1).T
