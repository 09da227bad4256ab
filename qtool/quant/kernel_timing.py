"""Which way of multiplying is the fastest on this machine: timings of one row times a weight, and the choice.

What is timed is decoding: one row, a weight that is not in the processor's caches, because a model's other weights
were read since, and code that is. So ``EVICTING`` numbers are read, then one weight warms the code, and the next one
is timed. All ways take turns, so that a busy machine slows them alike, and the shortest of ``ROUNDS`` turns counts.
Results are kept while the process runs, and not on disk.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant import affine, kernels
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packed_linear import PackedLinear

EXACT = "exact"  # the name of expanding the weight for each product, among the ways
TIMED_NUMBERS = 1 << 22  # most numbers of a weight that is timed; of a larger one, as many rows
TESTED_ROWS = 128  # rows of the weight that a backend is tried on before it is timed
EVICTING = 1 << 24  # float32 numbers
ROUNDS = 5
EXACT_ROUNDS = 1  # turns of the exact path, which takes longer than all others together


class Timing(NamedTuple):
    """The seconds that one row times a weight takes in each way, and why other ways are not possible.

    Of a weight of more than ``TIMED_NUMBERS`` they are those of a part of its rows.
    """

    out_features: int
    in_features: int
    spec: QuantSpec
    seconds: dict[str, float]  # by name of the backend, and ``EXACT``
    reasons: dict[str, str]  # of backends that cannot be used, by name

    @property
    def dense(self) -> float:
        """The seconds of the fastest dense product."""
        return min(seconds for name, seconds in self.seconds.items() if is_dense(name))

    def speedup(self, name: str) -> float:
        """Return how many times as fast as the fastest dense product a way is."""
        return self.dense / self.seconds[name]

    def __str__(self) -> str:
        ways = sorted((name for name in self.seconds if not is_dense(name)), key=self.seconds.__getitem__)
        shown = ", ".join(f"{name} {self.speedup(name):.2f} x" for name in ways)
        return f"{self.out_features} x {self.in_features} {self.spec.label()}: {shown} the speed of the dense product"


def is_dense(name: str) -> bool:
    """Return whether the way of this name multiplies by an expanded weight that is held."""
    return name.startswith(kernels.DENSE)


def ranked(seconds: Mapping[str, float], possible: Collection[str]) -> list[str]:
    """Return the ``possible`` ways that are faster than all that come after them and than ``EXACT``, fastest first.

    No way is chosen that is slower than another possible one. A way that is not possible, such as a dense weight for
    which there is no memory, plays no part.
    """
    faster = [name for name in seconds if name in possible and name != EXACT and seconds[name] < seconds[EXACT]]
    return sorted(faster, key=seconds.__getitem__)


def backends_for(dtype: torch.dtype, device: torch.device, experts: int = 1) -> list[kernels.Backend]:
    """Return the backends that a layer of ``dtype`` on ``device`` may use: dense ones as wide as ``dtype`` or wider."""
    wide = torch.finfo(dtype).bits
    return [
        backend
        for backend in kernels.BACKENDS
        if backend.runs_on(device)
        and (experts == 1 or backend.of_experts)
        and not (
            backend.library == kernels.DENSE and backend.dtype != dtype and torch.finfo(backend.dtype).bits <= wide
        )
    ]


def timing(spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Timing:
    """Return the timing of a weight ``[out_features, in_features]`` and inputs of ``dtype``; measured once."""
    return _timing(spec.weights_only, out_features, in_features, dtype, device, torch.get_num_threads())


@cache
@torch.inference_mode()
def _timing(
    spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, threads: int
) -> Timing:
    rows = max(1, min(out_features, TIMED_NUMBERS // in_features // 128 * 128))
    weight = _random(spec, rows, in_features, device)
    codes, scale, zero_point = (tensor[:TESTED_ROWS] for tensor in weight[:3])
    part = QuantizedWeight(codes, scale, zero_point, spec)
    x = torch.randn(1, in_features, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ways: dict[str, list[Callable[[], Tensor]]] = {
        EXACT: [partial(PackedLinear.from_quantized(weight, None), x) for _ in range(2)]
    }
    reasons = {}
    for backend in backends_for(dtype, device):
        kernel, reason = kernels.attempt(backend, part)
        if kernel is None:
            reasons[backend.name] = reason
        else:
            ways[backend.name] = [partial(kernels.Kernel(backend, backend.prepare(weight)), x) for _ in range(2)]
    return Timing(out_features, in_features, spec, _measure(ways, device), reasons)


def _random(spec: QuantSpec, out_features: int, in_features: int, device: torch.device) -> QuantizedWeight:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).to(device)
    scale, zero_point = affine.minmax_qparams(weight, spec)
    return QuantizedWeight(affine.quantize(weight, scale, zero_point, spec), scale, zero_point, spec)


def _measure(ways: Mapping[str, Sequence[Callable[[], Tensor]]], device: torch.device) -> dict[str, float]:
    """Return the shortest time in seconds of the last product of each way, after those before it."""
    evicting = torch.zeros(EVICTING, device=device)
    seconds = dict.fromkeys(ways, float("inf"))
    for turn in range(ROUNDS):
        for name, (*before, product) in ways.items():
            if name == EXACT and turn >= EXACT_ROUNDS:
                continue
            evicting.sum()
            for warming in before:
                warming()
            _wait(device)
            start = time.perf_counter()
            product()
            _wait(device)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
