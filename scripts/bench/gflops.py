"""The matrix products of a method, by phase, and how close each phase comes to the rate of ``torch.mm``.

    python scripts/bench/gflops.py gptq
    python scripts/bench/gflops.py efficientqat --dtype float32 --blocks 2 --set epochs=1 --set e2e.steps=8
    python scripts/bench/gflops.py lrqat --model builtin --blocks 0 --set steps=8

The method runs twice on the same model and text, in memory. The first run counts: every operator that multiplies
matrices is recorded with its shapes, its dtype and the phase that called it (products, batched products, attention,
factorisations, triangular solves). The second run takes the time of each phase, without the part of phases inside it.
Then each product that was recorded is run by itself, and the time of all of them is what the phase would take if it did
nothing else. ``share`` is this time by the measured one, so 1.0 is a phase of products alone. Elementwise work,
``addr`` and reductions count as no products: they lower the share.

Text is random, as the speed does not depend on it. With one thread times are CPU seconds, which other processes disturb
less; otherwise seconds.
"""

import argparse
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from real_models import add_model, chosen
from table import keyed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qtool.blocks.job import Job, load_method
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.evaluation.perplexity import score_windows
from qtool.methods import awq, efficientqat, gptq, lrqat, signround
from qtool.models.described import keep_first
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.training import fit

TRAINING = ((fit._Run, "advance", "training steps"), (fit._Run, "judge", "validation"))
# by method: where a function is looked up, its name, and the phase that it is
PHASES: dict[str, tuple[tuple[Any, str, str], ...]] = {
    "gptq": (
        (gptq, "collect", "Hessians"),
        (gptq, "factorise", "factorisation"),
        (gptq, "solve", "solve"),
        (gptq, "fit_grid", "range search"),
    ),
    "awq": ((awq, "search_scale", "search of scales"), (awq, "clipped_qparams", "clipping")),
    "signround": (
        (signround.RoundingTraining, "step", "training steps"),
        (signround.RoundingTraining, "measure", "validation"),
    ),
    "efficientqat": (*TRAINING, (efficientqat, "run_blocks", "Block-AP"), (efficientqat, "train_scales", "E2E-QP")),
    "lrqat": (*TRAINING, (lrqat, "input_directions", "directions")),
}
OTHER = ((BlockTask, "pack", "packing"),)
QUERY_ROWS, KEY_ROWS = ((768, 256), (192, 64), (0, 32)), 512  # torch's blocks of attention: from which length, of rows
MEASURED = 0.05  # seconds for which a product is repeated, at least

Product = tuple[str, tuple[int, ...], torch.dtype]  # the kind of an operator, its sizes, and the dtype it multiplies


class Phases:
    """The phase that is running, the time of each, and its products."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Start outside all phases."""
        self.clock, self.since = clock, clock()
        self.stack: list[tuple[str, ...]] = [()]
        self.seconds: dict[tuple[str, ...], float] = defaultdict(float)
        self.products: dict[tuple[str, ...], Counter[Product]] = defaultdict(Counter)

    def _charge(self) -> None:
        now = self.clock()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Charge what happens in the ``with`` block to the phase ``name`` of the phase that is running."""
        self._charge()
        self.stack.append((*self.stack[-1], name))
        try:
            yield
        finally:
            self._charge()
            self.stack.pop()

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return ``function``, which runs as the phase ``name``."""

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.within(name):
                return function(*args, **kwargs)

        return inside


class Products(TorchDispatchMode):
    """Records the operators that multiply matrices, in the phase that is running."""

    def __init__(self, phases: Phases) -> None:
        """Record into ``phases``."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.phases = phases

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record ``func`` if it is a product, and call it."""
        with self:  # operators made of others, which inference mode does not take apart
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        for product in products_of(func.overloadpacket.__name__, args, kwargs or {}):
            self.phases.products[self.phases.stack[-1]][product] += 1
        return func(*args, **(kwargs or {}))


def products_of(name: str, args: Any, kwargs: Any) -> list[Product]:
    """Return the products that one call of the operator ``name`` computes."""
    match name.rstrip("_"):
        case "mm":
            return [("mm", (*args[0].shape, args[1].shape[1]), args[0].dtype)]
        case "addmm":
            return [("mm", (*args[1].shape, args[2].shape[1]), args[1].dtype)]
        case "bmm":
            return [("bmm", (*args[0].shape, args[1].shape[2]), args[0].dtype)]
        case "baddbmm":
            return [("bmm", (*args[1].shape, args[2].shape[2]), args[1].dtype)]
        case "_scaled_dot_product_flash_attention_for_cpu":
            causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
            return _attention(args[0], args[1], bool(causal), 2)
        case "_scaled_dot_product_flash_attention_for_cpu_backward":
            return _attention(args[1], args[2], bool(args[7]), 5)
        case "linalg_cholesky_ex":
            return [("cholesky", (args[0].shape[-1],), args[0].dtype)]
        case "linalg_solve_triangular":
            return [("triangular", (args[0].shape[-1], args[1].shape[-1]), args[0].dtype)]
    return []


def _attention(query: Tensor, key: Tensor, causal: bool, count: int) -> list[Product]:
    """Return the ``count`` products of attention. Causal attention skips blocks of keys after the last query."""
    batch, heads, length, size = query.shape
    rows = next(rows for least, rows in QUERY_ROWS if length >= least)
    seen: Counter[int] = Counter()  # keys that a query is multiplied by -> number of queries
    for start in range(0, length, rows):
        last = min(start + rows, length) if causal else key.shape[2]
        seen[min(-(-last // KEY_ROWS) * KEY_ROWS, key.shape[2])] += min(rows, length - start)
    found: list[Product] = [("bmm", (batch * heads, number, size, keys), query.dtype) for keys, number in seen.items()]
    return found * count


def flops(product: Product) -> float:
    """Return the floating-point operations of a product."""
    kind, sizes, _ = product
    match kind:
        case "cholesky":
            return sizes[0] ** 3 / 3
        case "triangular":
            return sizes[0] ** 2 * sizes[1]
    return 2 * math.prod(sizes)


def seconds_alone(product: Product, clock: Callable[[], float]) -> float:
    """Return the seconds of a product by ``torch.mm`` (batched: ``torch.bmm``) at its shape, the best of several.

    Factorisations and triangular solves are given the rate of the square product of their size.
    """
    kind, sizes, dtype = product
    share = 1.0
    if kind in ("cholesky", "triangular"):
        share = flops(product) / (2 * sizes[0] ** 3)
        kind, sizes = "mm", (sizes[0],) * 3
    shapes = (sizes[:-1], (*sizes[:-3], sizes[-2], sizes[-1]))
    left, right = (torch.randn(shape).to(dtype) for shape in shapes)
    multiply = torch.mm if kind == "mm" else torch.bmm
    result = multiply(left, right)
    best, spent = math.inf, 0.0
    while spent < MEASURED:
        start, count = clock(), 0
        while (passed := clock() - start) < MEASURED / 8:
            multiply(left, right, out=result)
            count += 1
        best, spent = min(best, passed / max(count, 1)), spent + passed
    return best * share


def loaded_model(folder: Path, dtype: str, blocks: int) -> LoadedModel:
    """Return the model in ``folder`` with its first ``blocks`` blocks (0: all), in ``dtype``."""
    loaded = load_model(ModelConfig(path=str(folder), dtype=dtype, device="cpu"))
    if blocks:
        keep_first(loaded, blocks)
    return loaded


def run(args: argparse.Namespace, phases: Phases) -> None:
    """Run the method, and evaluate what it made, with ``phases`` in the places of its functions."""
    folder = chosen(args)
    loaded = loaded_model(folder, args.dtype, args.blocks)
    method = load_method(args.method)
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.windows, args.length)
    tokens = torch.randint(loaded.num_embeddings, shape, generator=generator)
    config = keyed(args.method, args.set)
    quant = QuantConfig.model_validate(
        {"num_bits": args.bits, "group_size": args.group_size, "symmetric": args.symmetric}
    )
    job = Job.select(loaded, quant, tokens, seed=args.seed)
    reference = loaded_model(folder, args.dtype, args.blocks) if args.eval_windows else None
    with ExitStack() as stack:
        for place, name, phase in (*PHASES[args.method], *OTHER):
            stack.enter_context(patch.object(place, name, phases.wrapped(getattr(place, name), phase)))
        phases.stack, phases.since = [("forward and the rest",)], phases.clock()
        method.run(job, config)
        phases._charge()
        phases.stack = [()]
    if reference is not None:
        phases.stack, phases.since = [("evaluation",)], phases.clock()
        score_windows(loaded.model, reference.model, tokens[: args.eval_windows], "auto", True, "evaluating")
        phases._charge()


def report(timed: Phases, counted: Phases, clock: Callable[[], float]) -> None:
    """Print a row for each phase."""
    alone: dict[Product, float] = {}
    print(f"{'phase':45}  {'seconds':>8}  {'GFLOP':>8}  {'GFLOP/s':>8}  {'torch.mm':>8}  {'share':>6}")
    total_seconds = total_flops = total_alone = 0.0
    for phase, seconds in timed.seconds.items():
        if not phase:
            continue
        products = counted.products[phase]
        for product in products:
            if product not in alone:
                alone[product] = seconds_alone(product, clock)
        work = sum(flops(product) * count for product, count in products.items()) / 1e9
        ideal = sum(alone[product] * count for product, count in products.items())
        row(" / ".join(phase[1:]) or phase[0], seconds, work, ideal)
        total_seconds, total_flops, total_alone = total_seconds + seconds, total_flops + work, total_alone + ideal
    row("all", total_seconds, total_flops, total_alone)


def row(name: str, seconds: float, work: float, ideal: float) -> None:
    """Print a phase: its seconds, its work in GFLOP, and the seconds ``ideal`` of its products alone."""
    peak = f"{work / ideal:8.1f}" if ideal else f"{'':8}"
    print(f"{name:45}  {seconds:8.2f}  {work:8.1f}  {work / seconds:8.1f}  {peak}  {ideal / seconds:6.2f}", flush=True)


def main() -> None:
    """Count, take the time, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=PHASES)
    add_model(parser, "smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of the model that are kept; 0: all")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--eval-windows", type=int, default=4, help="0: no evaluation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the method's section")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    counted, timed = Phases(clock), Phases(clock)
    with Products(counted):
        run(args, counted)
    run(args, timed)
    print(" ".join(sys.argv), f"({args.threads} thread{'s' * (args.threads > 1)})")
    report(timed, counted, clock)


if __name__ == "__main__":
    main()
