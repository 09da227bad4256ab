"""Choose the library for matrix products on the CPU, and their internal precision.

torch computes float32 products with MKL. On CPUs that are not Intel's, MKL takes about twice the time of oneDNN, which
torch contains, too. torch uses oneDNN if oneDNN is permitted to multiply in bfloat16 internally, and oneDNN uses this
permission only on CPUs that have bfloat16 units. So on a CPU without such units the permission keeps the precision of
float32 and changes only the library.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

PROBE_SIZE, PROBE_TOLERANCE = (
    256,
    2e-6,
)  # size of the probe matrices; tolerance of their product, relative to its largest entry
_last_set = "none"  # the last setting made here; if torch reports another one, the user made it, and it stays


def choose_library(dtype: torch.dtype) -> None:
    """Choose the library for this process and a model that computes in ``dtype``. A setting by the user stays.

    oneDNN is chosen for float32 models only. It keeps the compiled code of every product shape, which took 100 MB in
    GPTQ's loops; in a model of another dtype only these loops are in float32, and oneDNN does not make them faster.
    """
    global _last_set
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch replaces this module by an object
    if matmul.fp32_precision == _last_set:
        _last_set = "bf16" if dtype == torch.float32 and onednn_serves() else "none"
        matmul.fp32_precision = _last_set


@cache
def onednn_serves() -> bool:
    """Return whether MKL is likely to be slow on this CPU while oneDNN is exact."""
    known = Path("/proc/cpuinfo")
    if not torch.backends.mkl.is_available() or not known.exists():
        return False
    if "GenuineIntel" in known.read_text(encoding="utf-8", errors="replace"):
        return False
    with permitted("bf16"):
        return keeps_float32()


def keeps_float32() -> bool:
    """Return whether a float32 matrix product, with torch's present settings, is as exact as float32 allows."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(PROBE_SIZE, PROBE_SIZE, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    return bool((left @ right - exact).abs().max() <= PROBE_TOLERANCE * exact.abs().max())


def exact_products(dtype: torch.dtype) -> AbstractContextManager[None]:
    """If ``dtype`` is bfloat16, permit the fastest product of float32 matrices that hold bfloat16 values.

    Such values lose nothing when a CPU multiplies them in bfloat16, or a GPU in TF32; sums stay in float32.
    """
    return permitted("bf16", "tf32") if dtype == torch.bfloat16 else nullcontext()


@contextmanager
def permitted(cpu: str, cuda: str | None = None) -> Iterator[None]:
    """Permit these internal precisions of float32 matrix products while the context lasts."""
    backends: Any = torch.backends  # torch does not declare the types of these settings
    before = backends.mkldnn.matmul.fp32_precision, backends.cuda.matmul.fp32_precision
    try:
        backends.mkldnn.matmul.fp32_precision, backends.cuda.matmul.fp32_precision = cpu, cuda or before[1]
        yield
    finally:
        backends.mkldnn.matmul.fp32_precision, backends.cuda.matmul.fp32_precision = before
