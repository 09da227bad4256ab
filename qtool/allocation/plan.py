"""Mixed precision under a budget: choose the width of each unit of the model.

``sensitivity`` measures the cost of each width of each unit, ``solvers`` finds the widths that fit at the least cost,
and the result is a ``BitPlan``: data that becomes ``quant.overrides``, ``quant.embedding`` and ``quant.head`` of a run,
or a file that a person can read, edit and give to a recipe.

A budget counts stored sizes: for ``average_bits`` the codes, scales and zero points of the quantized weights, tables
included; for ``size`` the weight files, with all tensors that stay in floating point.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from pydantic import Field

from qtool.allocation.sensitivity import COST_ESTIMATORS, measure_costs
from qtool.allocation.solvers import SOLVERS
from qtool.allocation.units import Unit, all_units
from qtool.blocks.job import Job
from qtool.checkpoints import sizes as checkpoint_sizes
from qtool.config.budget import BudgetConfig
from qtool.config.quant import QuantConfig, QuantOverride, QuantSpec, TableGrid
from qtool.config.section import Section
from qtool.models.linears import stored_weight
from qtool.models.loaded import LoadedModel
from qtool.models.tables import float_tables, table_keys
from qtool.system.errors import InputError, RunError, listing
from qtool.system.version import __version__

TABLES = ("embedding", "head")  # names of the units that are tables, and of their keys in section quant


class Allotment(Section):
    """The width of one unit; ``linears`` are the full names of its weights."""

    unit: str
    linears: tuple[str, ...]
    num_weights: int = Field(ge=1, lt=2**63)
    num_bits: int
    costs: dict[int, float]  # cost of each width that was possible

    @property
    def cost(self) -> float:
        """The cost of the chosen width."""
        return self.costs[self.num_bits]

    def described(self) -> str:
        """Return the number of weights, and the cost of each width."""
        costs = ", ".join(f"{bits}: {cost:.3g}" for bits, cost in self.costs.items())
        return f"{self.num_weights:,} weights; {costs}"


class BitPlan(Section):
    """The widths of a model's linears and quantized tables."""

    model: str
    budget: BudgetConfig
    allotments: tuple[Allotment, ...]
    bits_per_weight: float  # average over quantized weights, including scales and zero points
    num_bytes: int = Field(ge=1, lt=2**63)  # upper bound of the size of the weight files

    @property
    def cost(self) -> float:
        """The sum of the costs of all units, which the solver minimized."""
        return sum(each.cost for each in self.allotments)

    def applied(self, quant: QuantConfig) -> QuantConfig:
        """Return ``quant`` with these widths as overrides and in the grids of its tables, and no budget."""
        widths = {name: each.num_bits for each in self.of_linears for name in each.linears}
        overrides = {name: QuantOverride.model_validate({"num_bits": bits}) for name, bits in widths.items()}
        changes = {"overrides": quant.overrides | overrides, "budget": None}
        return quant.model_copy(update=changes | self.table_grids(quant))

    @property
    def of_linears(self) -> list[Allotment]:
        """The widths of the linears of the blocks."""
        return [each for each in self.allotments if each.unit not in TABLES]

    def table_grids(self, quant: QuantConfig) -> dict[str, TableGrid | str]:
        """Return the keys ``embedding`` and ``head`` of ``quant`` with these widths, where a table is quantized."""
        grids: dict[str, TableGrid | str] = {}
        for each in self.allotments:
            if each.unit in TABLES:
                own = quant.head if each.unit == "head" and quant.head != "same" else quant.embedding
                assert isinstance(own, TableGrid)
                grids[each.unit] = own.model_copy(update={"num_bits": each.num_bits})
        if "embedding" in grids and "head" not in grids and quant.head != "float":
            grids["head"] = "same"  # tied, or there is no head
        return grids

    def _table_lines(self, quant: QuantConfig) -> Iterator[str]:
        """Yield the lines of a plan file that give the grids of tables."""
        tables = {each.unit: each for each in self.allotments if each.unit in TABLES}
        for key, grid in self.table_grids(quant).items():
            if isinstance(grid, TableGrid):
                values = grid.model_dump(mode="json")
                yield f"  # {', '.join(tables[key].linears)}: {tables[key].described()}"
                yield f"  {key}: {{{', '.join(f'{name}: {json.dumps(value)}' for name, value in values.items())}}}"
            elif grid != getattr(quant, key):
                yield f"  {key}: {grid}"

    def table(self) -> str:
        """Return a text table with a line for each unit and one for the whole."""
        rows = [("unit", "weights", "bits", "cost")]
        rows += [(a.unit, f"{a.num_weights:,}", str(a.num_bits), f"{a.cost:.3g}") for a in self.allotments]
        weights = sum(each.num_weights for each in self.allotments)
        rows.append(("all, as stored", f"{weights:,}", f"{self.bits_per_weight:.3f}", f"{self.cost:.3g}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in rows]
        measured = COST_ESTIMATORS[self.budget.estimator].unit
        cost = f"cost: {measured}, with that unit alone rounded; the last line is the sum"
        return "\n".join([*lines, "", cost, f"weight files: at most {self.num_bytes:,} bytes"])

    def yaml(self, quant: QuantConfig) -> str:
        """Return a file for ``quant.overrides``: the overrides of ``quant``, then the widths."""
        budget = self.budget
        limit = f"{budget.average_bits:g} average bits" if budget.average_bits else f"{budget.size or 0:,} bytes"
        if budget.share is not None:
            limit = f"{budget.share:.4g} of the float model's bytes"
        lines = [
            f"# Widths for {self.model} within {limit}, by qtool {__version__}.",
            f"# Estimator {budget.estimator}, solver {budget.solver}: predicted cost {self.cost:.3g} "
            f"({COST_ESTIMATORS[budget.estimator].unit}), {self.bits_per_weight:.4f} bits per weight, "
            f"weight files of at most {self.num_bytes:,} bytes.",
            "# Above each unit: the cost of each of its widths. To use this, as it is or edited: give the recipe",
            "# quant.overrides: PATH_OF_THIS_FILE, or paste the section into it, and leave out quant.budget.",
            "quant:",
        ]
        lines += self._table_lines(quant)
        lines.append("  overrides:")
        for pattern, override in quant.overrides.items():
            values = override.model_dump(mode="json", exclude_unset=True)
            lines.append(f"    {json.dumps(pattern)}: {json.dumps(values)}")
        for each in self.of_linears:
            lines.append(f"    # {each.described()}")
            for name in each.linears:
                key = name if re.fullmatch(r"[\w.]*[a-zA-Z_]\w*", name) else json.dumps(name)
                lines.append(f"    {key}: {{num_bits: {each.num_bits}}}")
        return "\n".join(lines) + "\n"


def check(quant: QuantConfig) -> None:
    """Refuse a recipe without a budget, or with overrides that contradict the budget.

    Raises:
        InputError: ``quant.budget`` is missing, or an override sets ``num_bits``.
    """
    if quant.budget is None:
        raise InputError("the recipe has no quant.budget; give it one, or pass --set quant.budget.average_bits=3")
    fixed = [pattern for pattern, override in quant.overrides.items() if "num_bits" in override.model_fields_set]
    if fixed:
        raise InputError(
            f"quant.overrides gives num_bits to '{fixed[0]}', but quant.budget chooses the widths; give fixed widths "
            "as quant.budget.pins, or leave the budget out (--set quant.budget=null) to use a plan"
        )


def plan(job: Job, whole: Callable[[], LoadedModel], units: Sequence[Unit], quant: QuantConfig) -> BitPlan:
    """Choose widths for the units of a job's model, which may be streamed; ``whole`` loads the model into memory.

    Raises:
        RunError: A cost is not finite.
    """
    budget = quant.budget
    assert budget is not None
    loaded, count = job.loaded, budget.num_samples
    sizes, capacity = _sizes(loaded, units, quant)
    some = job.first(count)
    if COST_ESTIMATORS[budget.estimator].whole:
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
    """Return the units of a model, and the widths that each may have.

    Raises:
        InputError: A pattern matches nothing, pins and floors contradict each other, or the budget is below the least
            that is possible, which the message states.
    """
    budget = quant.budget
    assert budget is not None
    groups = all_units(loaded, narrowest(quant))
    faults = list(_unmatched(loaded, quant, {name for unit in groups for name in unit.weight_names}))
    units = []
    for group in groups:
        floor = max((_last(budget.floors, name) or 0 for name in group.weight_names), default=0)
        pins = {pin for name in group.weight_names if (pin := _last(budget.pins, name))}
        unit = group._replace(choices=tuple(sorted(pins)) or tuple(b for b in budget.choices if b >= floor))
        named = f"{unit.name}: {', '.join(unit.weight_names)}" if unit.table else unit.name
        if len(pins) > 1:
            faults.append(f"{named} share one width, and quant.budget.pins gives them {_listed(pins)}")
        elif not unit.choices or min(unit.choices) < floor:
            widths = f"pins them to {min(pins)}" if pins else f"has choices {_listed(budget.choices)}"
            faults.append(f"{named} have a floor of {floor} bits, and quant.budget {widths}")
        units.append(unit)
    if faults:
        raise InputError(listing(f"{loaded.path} cannot be allotted bits with this recipe:", faults))
    _sizes(loaded, units, quant)
    return units


def narrowest(quant: QuantConfig) -> QuantConfig:
    """Return ``quant`` without its budget, and with the narrowest width that the budget allows for all grids."""
    budget = quant.budget
    assert budget is not None
    width = {"num_bits": min(*budget.choices, *budget.pins.values(), max(budget.choices))}
    grids = {key: grid for key in TABLES if isinstance(grid := getattr(quant, key), TableGrid)}
    tables = {key: grid.model_copy(update=width) for key, grid in grids.items()}
    return quant.model_copy(update={"budget": None, **width, **tables})


def _unmatched(loaded: LoadedModel, quant: QuantConfig, names: Collection[str]) -> Iterator[str]:
    """Yield a fault for each floor and pin that matches none of ``names``."""
    assert quant.budget is not None
    tables = {name: key for name, key in table_keys(loaded.model).items() if name not in names}
    for key in ("floors", "pins"):
        for pattern in getattr(quant.budget, key):
            if not any(fnmatchcase(name, pattern) for name in names):
                found = [(name, own) for name, own in tables.items() if fnmatchcase(name, pattern)]
                why = "".join(f"; {name} stays in floating point without a grid in {own}" for name, own in found)
                yield f"quant.budget.{key}: no quantized linear or table matches '{pattern}'{why}"


def _last(patterns: Mapping[str, int], name: str) -> int | None:
    """Return the value of the last pattern that ``name`` matches, or ``None``."""
    return next((value for pattern, value in reversed([*patterns.items()]) if fnmatchcase(name, pattern)), None)


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def mixed(units: Sequence[Unit]) -> dict[str, QuantSpec]:
    """Return grids as different as a plan can make them, to check exports before the plan is made."""
    return specs(units, [unit.choices[-(i % 2)] for i, unit in enumerate(units)])


def specs(units: Sequence[Unit], widths: Sequence[int]) -> dict[str, QuantSpec]:
    """Return the grid of each linear if the units get these widths."""
    return {
        target.name: target.spec.model_copy(update={"num_bits": bits})
        for unit, bits in zip(units, widths, strict=True)
        for target in unit.targets
    }


def shapes(units: Sequence[Unit]) -> dict[str, tuple[int, int]]:
    """Return ``(out, in)`` of each linear."""
    return {target.name: target.weight_shape for unit in units for target in unit.targets}


def _sizes(loaded: LoadedModel, units: Sequence[Unit], quant: QuantConfig) -> tuple[list[list[int]], int]:
    """Return the size of each width of each unit, and the capacity: in bits, or in bytes for ``size`` and ``share``.

    Raises:
        InputError: The smallest widths do not fit.
    """
    budget = quant.budget
    assert budget is not None
    if budget.average_bits is not None:
        sizes = [[_bits(unit, width) for width in unit.choices] for unit in units]
        num_weights = sum(unit.num_weights for unit in units)
        capacity, smallest = math.floor(budget.average_bits * num_weights), sum(each[0] for each in sizes)
        asked = f"average_bits is {budget.average_bits:g}", f"{smallest / num_weights:.4f} bits per weight"
    else:
        widest = [unit.choices[-1] for unit in units]
        sizes = [[_bytes(unit, width) for width in unit.choices] for unit in units]
        packed = sum(each[-1] for each in sizes)
        rest = checkpoint_sizes.planned_bytes(loaded, specs(units, widest), shapes(units)) - packed
        if budget.size is not None:
            limit, given = int(budget.size), "size"
        else:
            assert budget.share is not None
            limit, given = math.floor(budget.share * loaded.num_bytes), f"share is {budget.share:g}, so the size"
        capacity, smallest = limit - rest, sum(each[0] for each in sizes)
        least = f"{smallest + rest:,} bytes, of which {rest:,} are for all tensors but the packed weights"
        asked = f"{given} is {limit:,}", least + _of_tables(loaded, units)
    if smallest > capacity:
        raise InputError(
            f"quant.budget.{asked[0]}, and the least that is possible is {asked[1]}; raise the budget, allow smaller "
            "choices, floors or pins, or use a larger quant.group_size"
        )
    return sizes, capacity


def _of_tables(loaded: LoadedModel, units: Sequence[Unit]) -> str:
    """Return a part of a sentence on the tables that stay in floating point, and the key that makes them smaller."""
    tables = float_tables(loaded.model, {name for unit in units for name in unit.weight_names})
    if not tables:
        return ""
    parameters = [(name, stored_weight(loaded.model.get_submodule(name))) for name in tables]
    size = sum(w.numel() * loaded.file_dtypes.get(f"{name}.weight", w.dtype).itemsize for name, w in parameters)
    key = "quant.embedding" if "quant.embedding" in tables.values() else "quant.head"
    return f" ({', '.join(tables)}: {size:,} bytes in floating point, which {key}: {{num_bits: 8}} makes smaller)"


def _bits(unit: Unit, width: int) -> int:
    """Return the bits of codes, scales and zero points, as ``checkpoints.sizes.bits_per_weight`` counts them."""
    return sum(
        round(spec.bits_per_weight(shape[1]) * math.prod(shape))
        for spec, shape in zip(specs([unit], [width]).values(), shapes([unit]).values(), strict=True)
    )


def _bytes(unit: Unit, width: int) -> int:
    """Return the bytes of all tensors of the packed weights."""
    found = shapes([unit])
    parts = (checkpoint_sizes.packed_parts(name, spec, found[name]) for name, spec in specs([unit], [width]).items())
    return sum(tensor.nbytes for each in parts for tensor in each.values())
