"""Products of matrices: which library makes them on the processor, and sums of ``x^T x``.

torch hands those of float32 matrices to MKL, which on processors of other makers than Intel takes about twice the time
of oneDNN, which torch brings too. It hands them to oneDNN where that may multiply in bfloat16 inside, and oneDNN makes
use of this permission only where a processor has units for it. So where the permission leaves the precision of float32,
all it changes is the library.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

SIZE, PRECISION = 256, 2e-6  # of the matrices that are tried; of their product, as a share of its largest number
_left = "none"  # the setting that choose_library left


def choose_library(dtype: torch.dtype) -> None:
    """Choose for the process what suits a model that computes in ``dtype``. A setting of someone else stays.

    oneDNN is for float32 only: it keeps the code of each shape of product that it made, which took 100 MB in GPTQ's
    loops, and where nothing but these is in float32 it gains nothing.
    """
    global _left
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # a module takes its place
    if matmul.fp32_precision == _left:
        _left = "bf16" if dtype == torch.float32 and onednn_serves() else "none"
        matmul.fp32_precision = _left


@cache
def onednn_serves() -> bool:
    """Whether MKL is likely to be slow on this processor, and oneDNN exact."""
    known = Path("/proc/cpuinfo")
    if not torch.backends.mkl.is_available() or not known.exists():
        return False
    if "GenuineIntel" in known.read_text(encoding="utf-8", errors="replace"):
        return False
    with permitted("bf16"):
        return keeps_float32()


def keeps_float32() -> bool:
    """Whether a product of float32 matrices, as torch is set now, is as exact as float32 allows."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    return bool((left @ right - exact).abs().max() <= PRECISION * exact.abs().max())


def exact_products(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Where ``dtype`` is bfloat16, multiply float32 matrices that hold its values as fast as the machine can.

    Such values lose nothing when a processor multiplies them in bfloat16, or a GPU in TF32; sums stay float32.
    """
    return permitted("bf16", "tf32") if dtype == torch.bfloat16 else nullcontext()


@contextmanager
def permitted(cpu: str, cuda: str | None = None) -> Iterator[None]:
    """The precisions that products of float32 matrices may have inside, for as long as the context lasts."""
    backends: Any = torch.backends  # whose types do not say what is in it
    before = backends.mkldnn.matmul.fp32_precision, backends.cuda.matmul.fp32_precision
    try:
        backends.mkldnn.matmul.fp32_precision, backends.cuda.matmul.fp32_precision = cpu, cuda or before[1]
        yield
    finally:
        backends.mkldnn.matmul.fp32_precision, backends.cuda.matmul.fp32_precision = before
