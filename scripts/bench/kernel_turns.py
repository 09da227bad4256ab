"""One row through a chain of linears, with dense weights and with every kernel at every width, in turns.

    OMP_NUM_THREADS=1 python scripts/bench/kernel_turns.py --turns 15

Each chain has as many different weights of a shape as ``--megabytes`` of float32 hold, more than a processor's caches,
so that every product reads its weight from memory, as in decoding. ``x`` is the median over turns of the time of the
faster dense chain over that of the kernel's; ``error`` is the norm of the difference of one product from the exact one
over the norm of that, for a normal input.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from real_models import add_model, chosen
from torch import Tensor
from torch.nn import functional as F

from qtool.config.quant import BITS, QuantSpec
from qtool.config.sections import ModelConfig
from qtool.models.described import described_model
from qtool.models.linears import linear_shapes
from qtool.quant import affine, kernels
from qtool.quant.affine import QuantizedWeight

SHAPES = ((4096, 4096), (576, 576), (1536, 576), (576, 1536), (192, 576))  # the others are those of SmolLM2-135M


def weight_of(spec: QuantSpec, out_features: int, in_features: int, seed: int) -> QuantizedWeight:
    """Return random weights, rounded to the nearest codes."""
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    scale, zero_point = affine.minmax_qparams(weight, spec)
    return QuantizedWeight(affine.quantize(weight, scale, zero_point, spec), scale, zero_point, spec)


def chain(products: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> None:
    """Multiply ``x`` by each weight."""
    for product in products:
        product(x)


def measure(shape: tuple[int, int], group: int, symmetric: bool, megabytes: int, turns: int) -> None:
    """Print one line for each way of multiplying."""
    out_features, in_features = shape
    count = max(2, megabytes * 2**20 // (4 * out_features * in_features))
    x = torch.randn(1, in_features, generator=torch.Generator().manual_seed(99))
    floats = [torch.randn(shape, generator=torch.Generator().manual_seed(index)) for index in range(count)]
    ways: dict[str, Callable[[], None]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        products = [partial(F.linear, weight=weight.to(dtype)) for weight in floats]
        ways[f"dense {dtype}".replace("torch.", "")] = partial(chain, products, x.to(dtype))
    errors = {}
    for num_bits in BITS:
        spec = QuantSpec(num_bits=num_bits, group_size=group, symmetric=symmetric)
        for backend in kernels.BACKENDS:
            if backend.device == "cpu":
                made = []
                for index in range(count):
                    weight = weight_of(spec, *shape, index)
                    kernel, reason = kernels.attempt(backend, weight)
                    if kernel is None:
                        print(f"  {spec.label()} {backend.name}: {reason}")
                        break
                    made.append(kernel)
                if len(made) == count:
                    name = f"{spec.label()} {backend.name}"
                    exact = F.linear(x, affine.dequantize(*weight))
                    errors[name] = ((made[-1](x) - exact).norm() / exact.norm()).item()
                    ways[name] = partial(chain, made, x)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if turn:  # the first one warms up
                seconds[name].append((time.perf_counter() - start) / count)
    faster = min((name for name in ways if name.startswith("dense")), key=lambda name: median(seconds[name]))
    print(f"{out_features} x {in_features}, {count} weights, against {faster}:")
    for name, each in seconds.items():
        ratio = median(dense / own for dense, own in zip(seconds[faster], each, strict=True))
        error = f", error {errors[name]:.2%}" if name in errors else ""
        print(f"  {name}: median {median(each) * 1e3:.3f} ms, fastest {min(each) * 1e3:.3f} ms, {ratio:.2f} x{error}")


@torch.inference_mode()
def text_of(shapes: Iterable[tuple[int, int]]) -> str:
    """Return ``shapes`` as ``--shapes`` takes them."""
    return ",".join(f"{out_features}x{in_features}" for out_features, in_features in shapes)


def shapes_of(folder: Path) -> list[tuple[int, int]]:
    """Return the different shapes ``(out, in)`` of the linears of the model in ``folder``, the largest first."""
    model = described_model(ModelConfig(path=str(folder)), weights=False)
    return sorted(set(linear_shapes(model.blocks()).values()), key=lambda shape: (-shape[0] * shape[1], shape))


def main() -> None:
    """Measure each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help=f"default: those of --model, else {text_of(SHAPES)}")
    add_model(parser, None)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--megabytes", type=int, default=256, help="of float32 weights in each chain")
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, groups of {args.group}")
    shapes = args.shapes or text_of(shapes_of(chosen(args)) if args.model else SHAPES)
    for text in shapes.split(","):
        out_features, in_features = map(int, text.split("x"))
        measure((out_features, in_features), args.group, not args.asymmetric, args.megabytes, args.turns)


if __name__ == "__main__":
    main()
