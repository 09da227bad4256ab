"""Mixed precision under a budget: which unit of the model gets how many bits.

``sensitivity`` says what each width of each unit costs, ``knapsack`` finds the widths that fit and cost least, and the
result is a ``Plan``: data, that becomes ``quant.overrides`` of a run, or a file to be read, edited and given to a
recipe.

What a budget counts is what is stored: codes, scales and zero points of the quantized weights for ``average_bits``; the
weight files, with embeddings and all else that stays in floating point, for ``size``.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from qtool.allocation.sensitivity import ESTIMATORS, Unit, fused, measure_costs
from qtool.allocation.solvers import SOLVERS
from qtool.blocks.job import Job
from qtool.checkpoints import sizes as checkpoint_sizes
from qtool.config.budget import BudgetConfig
from qtool.config.quant import QuantConfig, QuantOverride, QuantSpec
from qtool.config.section import Section
from qtool.models.loaded import LoadedModel
from qtool.models.targets import select_targets
from qtool.system.errors import InputError, RunError
from qtool.system.version import __version__


class Allotment(Section):
    """What one unit gets."""

    unit: str
    linears: tuple[str, ...]
    num_weights: int
    num_bits: int
    costs: dict[int, float]  # of each width that it could have

    @property
    def cost(self) -> float:
        """Of the width that it gets."""
        return self.costs[self.num_bits]


class BitPlan(Section):
    """The widths of a model's linears."""

    model: str
    budget: BudgetConfig
    allotments: tuple[Allotment, ...]
    bits_per_weight: float  # of quantized weights, scales and zero points counted
    num_bytes: int  # of the weight files, at most

    @property
    def cost(self) -> float:
        """The sum over units: what the solver lowered."""
        return sum(each.cost for each in self.allotments)

    def applied(self, quant: QuantConfig) -> QuantConfig:
        """``quant`` with these widths as overrides, and no budget."""
        widths = {name: each.num_bits for each in self.allotments for name in each.linears}
        overrides = {name: QuantOverride.model_validate({"num_bits": bits}) for name, bits in widths.items()}
        return quant.model_copy(update={"overrides": quant.overrides | overrides, "budget": None})

    def table(self) -> str:
        """A line for each unit and one for all, for people."""
        rows = [("unit", "weights", "bits", "cost")]
        rows += [(a.unit, f"{a.num_weights:,}", str(a.num_bits), f"{a.cost:.3g}") for a in self.allotments]
        weights = sum(each.num_weights for each in self.allotments)
        rows.append(("all, as stored", f"{weights:,}", f"{self.bits_per_weight:.3f}", f"{self.cost:.3g}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in rows]
        return "\n".join([*lines, "", f"weight files: at most {self.num_bytes:,} bytes"])

    def yaml(self, quant: QuantConfig) -> str:
        """A file for ``quant.overrides``: those of ``quant``, and then the widths."""
        budget = self.budget
        limit = f"{budget.average_bits:g} average bits" if budget.average_bits else f"{budget.size:,} bytes"
        lines = [
            f"# Widths for {self.model} within {limit}, by qtool {__version__}.",
            f"# Estimator {budget.estimator}, solver {budget.solver}: predicted cost {self.cost:.3g}, "
            f"{self.bits_per_weight:.4f} bits per weight, weight files of at most {self.num_bytes:,} bytes.",
            "# Above each unit: what each of its widths costs. To use this, as it is or edited: give the recipe",
            "# quant.overrides: PATH_OF_THIS_FILE, or paste the section into it, and leave out quant.budget.",
            "quant:",
            "  overrides:",
        ]
        for pattern, override in quant.overrides.items():
            values = override.model_dump(mode="json", exclude_unset=True)
            lines.append(f"    {json.dumps(pattern)}: {json.dumps(values)}")
        for each in self.allotments:
            costs = ", ".join(f"{bits}: {cost:.3g}" for bits, cost in each.costs.items())
            lines.append(f"    # {each.num_weights:,} weights; {costs}")
            for name in each.linears:
                key = name if re.fullmatch(r"[\w.]*[a-zA-Z_]\w*", name) else json.dumps(name)
                lines.append(f"    {key}: {{num_bits: {each.num_bits}}}")
        return "\n".join(lines) + "\n"


def check(quant: QuantConfig) -> None:
    """Whether a budget is asked for, and nothing that contradicts it.

    Raises:
        InputError: it is not.
    """
    if quant.budget is None:
        raise InputError("the recipe has no quant.budget; give it one, or pass --set quant.budget.average_bits=3")
    fixed = [pattern for pattern, override in quant.overrides.items() if "num_bits" in override.model_fields_set]
    if fixed:
        raise InputError(
            f"quant.overrides gives num_bits to '{fixed[0]}', and quant.budget chooses the widths; give fixed ones as "
            "quant.budget.pins, or leave the budget out (--set quant.budget=null) to use a plan"
        )


def plan(job: Job, whole: Callable[[], LoadedModel], units: Sequence[Unit], quant: QuantConfig) -> BitPlan:
    """Allot widths to the units of a job's model, which may be streamed; ``whole`` gives the model in memory.

    Raises:
        RunError: a cost that is not finite.
    """
    budget = quant.budget
    assert budget is not None
    loaded, count = job.loaded, budget.num_samples
    sizes, capacity = _sizes(loaded, units, budget)
    some = replace(job, tokens=job.text[:count], labels=None if job.labels is None else job.labels[:count])
    if ESTIMATORS[budget.estimator].whole:
        some = replace(some, loaded=whole(), workspace=None)
    costs = measure_costs(some, units, budget)
    for unit, cost in zip(units, costs, strict=True):
        wrong = [bits for bits, value in cost.items() if not math.isfinite(value)]
        if wrong:
            raise RunError(
                f"{unit.name}: estimator {budget.estimator} found a cost of {cost[wrong[0]]} for {wrong[0]} bits; use "
                "other calibration text, model.dtype: float32, or another quant.budget.estimator"
            )
    rows = [[cost[bits] for bits in unit.choices] for unit, cost in zip(units, costs, strict=True)]
    chosen = SOLVERS[budget.solver](sizes, rows, capacity)
    widths = [unit.choices[index] for unit, index in zip(units, chosen, strict=True)]
    return BitPlan(
        model=loaded.path,
        budget=budget,
        allotments=tuple(
            Allotment(
                unit=unit.name,
                linears=tuple(target.name for target in unit.targets),
                num_weights=unit.num_weights,
                num_bits=bits,
                costs=cost,
            )
            for unit, bits, cost in zip(units, widths, costs, strict=True)
        ),
        bits_per_weight=checkpoint_sizes.bits_per_weight(specs(units, widths), shapes(units)),
        num_bytes=checkpoint_sizes.planned_bytes(loaded, specs(units, widths), shapes(units)),
    )


def units_of(loaded: LoadedModel, quant: QuantConfig) -> list[Unit]:
    """The units of a model and the widths that each may have.

    Raises:
        InputError: a pattern that matches nothing, pins and floors that contradict each other, or a budget below the
            least that is possible; the message says what that is.
    """
    budget = quant.budget
    assert budget is not None
    narrowest = min(*budget.choices, *budget.pins.values(), max(budget.choices))
    targets = select_targets(loaded, quant.model_copy(update={"num_bits": narrowest, "budget": None}))
    groups = fused(loaded, targets)
    faults = [
        f"quant.budget.{key}: no quantized linear matches '{pattern}'"
        for key, patterns in (("floors", budget.floors), ("pins", budget.pins))
        for pattern in patterns
        if not any(fnmatchcase(target.name, pattern) for target in targets)
    ]
    units = []
    for group in groups:
        floor = max((_last(budget.floors, target.name) or 0 for target in group), default=0)
        pins = {pin for target in group if (pin := _last(budget.pins, target.name))}
        unit = Unit(tuple(group), tuple(sorted(pins)) or tuple(b for b in budget.choices if b >= floor))
        if len(pins) > 1:
            faults.append(f"{unit.name} share one width, and quant.budget.pins gives them {_listed(pins)}")
        elif not unit.choices or min(unit.choices) < floor:
            widths = f"pins them to {min(pins)}" if pins else f"has choices {_listed(budget.choices)}"
            faults.append(f"{unit.name} have a floor of {floor} bits, and quant.budget {widths}")
        units.append(unit)
    if faults:
        raise InputError("\n  ".join([f"{loaded.path} cannot be allotted bits with this recipe:", *faults]))
    _sizes(loaded, units, budget)
    return units


def _last(patterns: Mapping[str, int], name: str) -> int | None:
    """The value of the last pattern that ``name`` matches."""
    return next((value for pattern, value in reversed([*patterns.items()]) if fnmatchcase(name, pattern)), None)


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def mixed(units: Sequence[Unit]) -> dict[str, QuantSpec]:
    """Grids as different as a plan can make them, to ask an exporter before there is a plan."""
    return specs(units, [unit.choices[-(i % 2)] for i, unit in enumerate(units)])


def specs(units: Sequence[Unit], widths: Sequence[int]) -> dict[str, QuantSpec]:
    """The grid of each linear when the units get these widths."""
    return {
        target.name: target.spec.model_copy(update={"num_bits": bits})
        for unit, bits in zip(units, widths, strict=True)
        for target in unit.targets
    }


def shapes(units: Sequence[Unit]) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of each linear."""
    return {target.name: target.weight_shape for unit in units for target in unit.targets}


def _sizes(loaded: LoadedModel, units: Sequence[Unit], budget: BudgetConfig) -> tuple[list[list[int]], int]:
    """What each width of each unit takes, and how much all may take together: in bits, or in bytes for ``size``.

    Raises:
        InputError: the smallest widths do not fit.
    """
    if budget.size is None:
        assert budget.average_bits is not None
        sizes = [[_bits(unit, width) for width in unit.choices] for unit in units]
        num_weights = sum(unit.num_weights for unit in units)
        capacity, smallest = math.floor(budget.average_bits * num_weights), sum(each[0] for each in sizes)
        asked = f"average_bits is {budget.average_bits:g}", f"{smallest / num_weights:.4f} bits per weight"
    else:
        widest = [unit.choices[-1] for unit in units]
        sizes = [[_bytes(unit, width) for width in unit.choices] for unit in units]
        packed = sum(each[-1] for each in sizes)
        rest = checkpoint_sizes.planned_bytes(loaded, specs(units, widest), shapes(units)) - packed
        capacity, smallest = budget.size - rest, sum(each[0] for each in sizes)
        asked = f"size is {budget.size:,}", f"{smallest + rest:,} bytes, of which {rest:,} are not of packed weights"
    if smallest > capacity:
        raise InputError(
            f"quant.budget.{asked[0]}, and the least that is possible is {asked[1]}; raise the budget, allow smaller "
            "choices, floors or pins, or take a larger quant.group_size"
        )
    return sizes, capacity


def _bits(unit: Unit, width: int) -> int:
    """Codes, scales and zero points, as ``checkpoint.bits_per_weight`` counts them."""
    return sum(
        round(spec.bits_per_weight(shape[1]) * math.prod(shape))
        for spec, shape in zip(specs([unit], [width]).values(), shapes([unit]).values(), strict=True)
    )


def _bytes(unit: Unit, width: int) -> int:
    """All tensors of the packed linears."""
    found = shapes([unit])
    parts = (checkpoint_sizes.packed_parts(name, spec, found[name]) for name, spec in specs([unit], [width]).items())
    return sum(tensor.nbytes for each in parts for tensor in each.values())
