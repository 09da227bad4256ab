"""Allocated widths beside uniform and arbitrary ones of the same size, on the built-in model.

    python scripts/bench/allocation.py --out allocation.json [--method gptq] [--bits 2.5,3,3.5] [--limit 16]

Every allocation is quantized by the method and measured on the first windows of WikiText-2: perplexity, and divergence
from the float model in nats per token. A budget counts scales and zero points. At equal size an estimator is compared
with uniform widths in smaller groups, with what a person would try, and with chance:

* ``uniform w2g32``: one width for all units, and the group size with which it takes just the budget;
* ``first``, ``last``: all units get the smallest width, then as many as fit the largest next one, from the first block
  on or from the last;
* ``random``: units in a seeded random order; the best of ``--random`` of them, by divergence, and their mean.

Uniform widths of whole bits are given too. Spearman's correlation compares the order of the units by predicted cost
with that by the divergence on WikiText-2, which no estimator has seen, when the method quantizes one unit alone.
Finished cells are kept in the output file, so a killed run goes on where it stopped. Needs QTOOL_DATA_DIR.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from real_models import add_model, chosen

from qtool.allocation import plan as bit_plan
from qtool.allocation.sensitivity import COST_ESTIMATORS
from qtool.allocation.units import Unit
from qtool.blocks.job import Job, load_method
from qtool.checkpoints.sizes import bits_per_weight
from qtool.config.budget import BudgetConfig
from qtool.config.quant import QuantConfig
from qtool.config.sections import DataConfig, ModelConfig
from qtool.data import windows
from qtool.data.windows import Calibration
from qtool.evaluation import perplexity
from qtool.models.loading import load_model
from qtool.system.environment import environment

Widths = tuple[int, ...]
SCALE_BITS = 16  # stored bits per group of a symmetric grid


def by_order(units: list[Unit], average_bits: float, order: list[int]) -> Widths:
    """Return widths: in rounds, each unit in ``order`` is raised to its next choice if that fits the budget."""
    chosen, shapes = [0] * len(units), bit_plan.shapes(units)

    def fits() -> bool:
        widths = [unit.choices[index] for unit, index in zip(units, chosen, strict=True)]
        return bits_per_weight(bit_plan.specs(units, widths), shapes) <= average_bits

    for _ in units[0].choices[1:]:
        for item in order:
            chosen[item] += 1
            if not fits():
                chosen[item] -= 1
    return tuple(unit.choices[index] for unit, index in zip(units, chosen, strict=True))


def spearman(a: list[float], b: list[float]) -> float:
    """Return the rank correlation of two lists without ties."""
    ranks = torch.tensor([a, b], dtype=torch.float64).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])


class Bench:
    """The finished cells, and the models and text to make others."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the finished cells, and load the models and text that every cell needs."""
        self.args = args
        self.found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
        self.found.setdefault("environment", environment())
        self.found.setdefault("asked", {k: str(v) for k, v in vars(args).items() if k != "out"})
        self.model = ModelConfig(path=str(chosen(args)), dtype="float32")
        self.reference = load_model(self.model)
        text = DataConfig(source="enwiki", num_samples=args.samples, seq_len=512)
        self.text: Calibration = windows.calibration(text, self.reference, 0)
        self.windows = windows.perplexity_windows("wikitext2", self.reference, 1024, args.limit, 0)
        self.quant = QuantConfig(group_size=args.group_size, symmetric=not args.asymmetric)

    def cell(self, key: str, make: Callable[[], Any]) -> Any:
        """Return a finished cell, or make and store it."""
        cells = self.found.setdefault("cells", {})
        if key not in cells:
            cells[key] = make()
            self.args.out.write_text(json.dumps(self.found, indent=1) + "\n")
            print(key, json.dumps(cells[key])[:160], flush=True)
        return cells[key]

    def units(self, budget: BudgetConfig) -> list[Unit]:
        """Return the units of the built-in model."""
        return bit_plan.units_of(self.reference, self.quant.model_copy(update={"budget": budget}))

    def plan(self, estimator: str, average_bits: float) -> list[dict[str, Any]]:
        """Return the planned width and the costs of each unit; ``loss:nearest`` names an estimator and its rounding."""
        name, _, rounding = estimator.partition(":")
        raw = {"average_bits": average_bits, "estimator": name, "rounding": rounding or "gptq"}
        budget = BudgetConfig.model_validate(raw)
        quant = self.quant.model_copy(update={"budget": budget})
        job = Job(self.reference, (), self.text.tokens, self.text.labels)
        plan = bit_plan.plan(job, lambda: self.reference, self.units(budget), quant)
        return [allotment.model_dump(mode="json") for allotment in plan.allotments]

    def measure(self, units: list[Unit], widths: Widths) -> dict[str, float]:
        """Return perplexity, divergence and stored bits of the model with these widths."""

        specs = bit_plan.specs(units, widths)
        overrides = {name: {"num_bits": spec.num_bits} for name, spec in specs.items()}

        def make() -> dict[str, float]:
            return {"bits": bits_per_weight(specs, bit_plan.shapes(units)), **self.quantized(overrides)}

        return dict(self.cell(f"{self.args.method} {''.join(map(str, widths))}", make))

    def uniform(self, num_bits: int, group_size: int) -> dict[str, float]:
        """Return perplexity, divergence and stored bits with one grid for all linears."""
        bits = num_bits + SCALE_BITS / group_size
        grid = {"num_bits": num_bits, "group_size": group_size}
        return dict(
            self.cell(
                f"{self.args.method} w{num_bits}g{group_size}", lambda: {"bits": bits, **self.quantized({}, grid)}
            )
        )

    def quantized(self, overrides: dict[str, Any], grid: dict[str, int] | None = None) -> dict[str, float]:
        """Quantize the model with these overrides and return its perplexity and divergence."""
        loaded, plugin = load_model(self.model), load_method(self.args.method)
        quant = QuantConfig.model_validate(self.quant.model_dump() | {"overrides": overrides} | (grid or {}))
        config = plugin.config(name=self.args.method)
        plugin.run(Job.select(loaded, quant, self.text.tokens if plugin.needs_data(config) else None), config)
        kl = perplexity.divergence(loaded.model, self.reference.model, self.windows, "auto")["kl"]
        return {"perplexity": perplexity.perplexity(loaded.model, self.windows, "auto").value, "kl": kl.value}

    def alone(self, units: list[Unit], width: int) -> list[float]:
        """Return the divergence on held-out text of each unit, quantized alone to ``width`` bits."""
        rest = {"*": {"skip": True}}
        each = ({target.name: {"skip": False, "num_bits": width} for target in unit.targets} for unit in units)
        return [
            self.cell(f"{self.args.method} {unit.name} {width}", partial(self.quantized, rest | one))["kl"]
            for unit, one in zip(units, each, strict=True)
        ]


def main() -> None:
    """Measure the missing cells and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench-allocation.json"))
    add_model(parser)
    parser.add_argument("--method", default="gptq", help="method, used with its defaults")
    parser.add_argument("--bits", default="2.5,3.0,3.5")
    parser.add_argument("--estimators", default=",".join([*COST_ESTIMATORS, "loss:nearest"]))
    parser.add_argument("--limit", type=int, default=16, help="windows of 1024 tokens to measure on")
    parser.add_argument("--samples", type=int, default=128, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--random", type=int, default=4, help="random allocations for each budget")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    units = bench.units(BudgetConfig(average_bits=8.5))
    order = list(range(len(units)))
    rows: list[tuple[str, str, dict[str, float]]] = []
    for width in (2, 3, 4):
        rows.append(("", f"uniform {width}", bench.measure(units, (width,) * len(units))))
    for budget in args.bits.split(","):
        bits = float(budget)
        for width in (2, 3, 4):
            group = SCALE_BITS / (bits - width) if bits > width else 0.5
            if group == int(group) and not args.asymmetric:
                rows.append((budget, f"uniform w{width}g{int(group)}", bench.uniform(width, int(group))))
        rows.append((budget, "first", bench.measure(units, by_order(units, bits, order))))
        rows.append((budget, "last", bench.measure(units, by_order(units, bits, order[::-1]))))
        chance = []
        for seed in range(args.random):
            shuffled = random.Random(seed).sample(order, len(order))
            chance.append(bench.measure(units, by_order(units, bits, shuffled)))
        if chance:
            rows.append((budget, f"random, best of {len(chance)}", min(chance, key=lambda cell: cell["kl"])))
            rows.append((budget, "random, mean", {k: sum(c[k] for c in chance) / len(chance) for k in chance[0]}))
        for name in args.estimators.split(","):
            plan = bench.cell(f"plan {name} {budget}", partial(bench.plan, name, bits))
            rows.append((budget, name, bench.measure(units, tuple(each["num_bits"] for each in plan))))
    print("\n| budget | allocation | bits per weight | perplexity | KL |\n|---:|---|---:|---:|---:|")
    for label, name, cell in rows:
        print(f"| {label} | {name} | {cell['bits']:.3f} | {cell['perplexity']:.2f} | {cell['kl']:.4f} |")
    widths = [2, 3]
    print("\n| Spearman, width | " + " | ".join(map(str, widths)) + " |\n|---|" + "---:|" * len(widths))
    first = args.bits.split(",")[0]
    for name in args.estimators.split(","):
        plan = bench.found["cells"][f"plan {name} {first}"]
        found = [spearman([each["costs"][str(w)] for each in plan], bench.alone(units, w)) for w in widths]
        bench.found.setdefault("spearman", {})[name] = dict(zip(map(str, widths), found, strict=True))
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in found) + " |")
    args.out.write_text(json.dumps(bench.found, indent=1) + "\n")


if __name__ == "__main__":
    main()
