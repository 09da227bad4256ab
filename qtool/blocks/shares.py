"""The work of one run that several processes share: windows of text, rows of weights, and the check of the result.

The text is cut into the batches that one process would make, and each process holds some of them, so that the hidden
states of a window are the same bits however many processes there are. The rows of a weight do not affect each other in
any method that solves a whole weight at once, so each process solves some rows.

Collectives are called by the method, never inside a forward of a block: the greenlets of ``stages.py`` may pause those
in any order.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant.affine import QuantizedWeight
from qtool.system import distributed
from qtool.system.errors import InputError


class Share(NamedTuple):
    """The batches of the text that this process holds."""

    sizes: tuple[int, ...]  # number of windows of each batch of the whole text
    numbers: tuple[int, ...]  # which batches this process holds, rising

    @property
    def starts(self) -> list[int]:
        """The number of windows of the text before each batch, and at the end that of all."""
        return [0, *accumulate(self.sizes)]

    @property
    def windows(self) -> list[range]:
        """The windows of each batch that this process holds, by their numbers in the whole text."""
        starts = self.starts
        return [range(starts[number], starts[number + 1]) for number in self.numbers]

    @property
    def num_windows(self) -> int:
        """The number of windows that this process holds."""
        return sum(map(len, self.windows))


def own_rows(rows: Tensor, share: Share) -> Tensor:
    """Return those of ``rows`` ``[n, ...]``, as many of each window, that belong to the windows of this process."""
    by_window: Tensor = rows.unflatten(0, (sum(share.sizes), -1))
    return by_window[[*chain(*share.windows)]].flatten(0, 1)


def owner(number: int, count: int) -> int:
    """Return which of ``count`` processes holds the batch ``number``: the sum of its digits to the base ``count``.

    It is taken modulo ``count``. Any ``count`` batches in a row from a multiple of ``count`` on have all owners, and so
    have any that lie ``count`` apart: the first batches, and batches spread evenly, are shared well.
    """
    total = 0
    while number and count > 1:
        number, digit = divmod(number, count)
        total += digit
    return total % count


def share_of(num_windows: int, size: int) -> tuple[int, Share]:
    """Cut a text into batches of ``size`` windows, or fewer if there were none for some process.

    Return the size and what this process holds.

    Raises:
        InputError: there are fewer windows than processes.
    """
    rank, count = distributed.place()
    check_enough(num_windows, count)
    size = min(size, num_windows // count)
    sizes = tuple(min(size, num_windows - start) for start in range(0, num_windows, size))
    return size, Share(sizes, tuple(n for n in range(len(sizes)) if owner(n, count) == rank))


def check_enough(num_windows: int, count: int) -> None:
    """Refuse more processes than calibration windows.

    Raises:
        InputError: there are fewer windows than processes.
    """
    if num_windows < count:
        raise InputError(
            f"data.num_samples: found {num_windows} calibration window(s) for {count} processes, and each needs one; "
            f"raise it, or start at most {num_windows}"
        )


def parts_of(count: int) -> list[int]:
    """Return how many of ``count`` rows or experts each process solves, in the order of ranks."""
    _, processes = distributed.place()
    return [count * (i + 1) // processes - count * i // processes for i in range(processes)]


def own_part(count: int) -> slice:
    """Return which of ``count`` rows or experts this process solves."""
    rank, _ = distributed.place()
    sizes = parts_of(count)
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def by_rows(weight: Tensor, spec: QuantSpec, solve: Callable[[Tensor], QuantizedWeight]) -> QuantizedWeight:
    """Return ``solve(weight)`` for ``weight`` ``[out, in]``, of which each process solves its share of the rows."""
    part = weight[own_part(len(weight))]
    found = solve(part) if len(part) else no_rows(weight, spec)
    return gathered(found, parts_of(len(weight)))


def no_rows(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Return a quantized weight with the columns of ``weight`` and without rows."""
    ends = weight.new_empty(0, spec.num_groups(weight.shape[1]), dtype=torch.float32)
    return QuantizedWeight(weight.new_empty(0, weight.shape[1], dtype=torch.uint8), ends, ends, spec)


def stacked(found: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return several weights of one grid as one, row below row."""
    codes, scales, zero_points, specs = zip(*found, strict=True)
    return QuantizedWeight(torch.cat(codes), torch.cat(scales), torch.cat(zero_points), specs[0])


def gathered(found: QuantizedWeight, sizes: list[int]) -> QuantizedWeight:
    """Return the rows that all processes solved, in the order of ranks; ``sizes`` has how many each solved."""
    codes, scale, zero_point = (distributed.joined(part, sizes) for part in found[:3])
    return QuantizedWeight(codes, scale, zero_point, found.spec)


def pooled(found: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    """Return means ``[in, in]`` over the tokens of experts, and their tokens, over all processes.

    Only the process that solves an expert (``own_part``) holds its mean; in others it is empty. All are added up before
    any expert is solved, so that no process waits for another one's solutions.
    """
    totals = distributed.summed(*(count for _, count in found))
    solvers = [rank for rank, size in enumerate(parts_of(len(found))) for _ in range(size)]
    held = []
    for solver, total in zip(solvers, totals, strict=True):
        mean, count = found.pop(0)
        if total:
            mean.mul_(count / total)
        distributed.reduce_sum(mean, solver)
        held.append((mean if solver == distributed.place()[0] else mean.new_empty(0), int(total)))
    return held


def check_same(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that all processes have the same bits in the tensors of a finished block.

    Raises:
        RunError: they have not.
    """
    if not distributed.active():
        return
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    distributed.check_equal(digest.digest(), name)
