"""What ``target:`` does to a recipe, from ``config.json`` alone, before a weight is read.

Grids, activations, tables and fused linears that the engine does not load are refused, with the key to change. Under a
budget, the widths to choose from are those that it loads. If the recipe names no export, one is added in the format
that the engine reads best.
"""

from typing import NamedTuple

from qtool.allocation import k_mixture
from qtool.allocation.plan import narrowest
from qtool.checkpoints.native import PlannedCheckpoint
from qtool.config import catalog
from qtool.config.budget import BudgetConfig
from qtool.config.engines import READS, formats_of
from qtool.config.loadable import Verdict, Weights, allowed, best, verdict, version_note
from qtool.config.quant import QuantConfig, QuantSpec
from qtool.config.recipe import Recipe
from qtool.config.sections import ExportConfig
from qtool.exporters import _base
from qtool.models.described import described_model, selected
from qtool.models.linears import linear_shapes
from qtool.models.loaded import LoadedModel
from qtool.models.tables import Tables
from qtool.system import progress
from qtool.system.errors import InputError, listing


class Selection(NamedTuple):
    """The grids of a recipe on a model, and the checkpoint that they come to."""

    weights: Weights
    planned: PlannedCheckpoint


def applied(recipe: Recipe) -> Recipe:
    """Return the recipe as its target makes it: with the widths that the engine loads, and an export for it.

    Raises:
        InputError: the engine does not load the result, or none of the exports; the message says what to change.
    """
    if recipe.target is None:
        return recipe
    if note := version_note(recipe.target.engine, recipe.target.version):
        progress.note(note)
    if recipe.model.free:
        _check_named(recipe)
        return recipe
    loaded = described_model(recipe.model)
    if recipe.quant.budget is not None:
        recipe = _narrowed(recipe, loaded, recipe.quant.budget)
    with progress.use(progress.Sink()):  # the run itself says what it makes of a mixture
        quant = k_mixture.quant_of(recipe, loaded)
    found = loads(recipe, selection(loaded, _widest(quant)))
    if not found.loads:
        raise InputError(refusal(recipe, found))
    if recipe.export or found.format == "native":
        return recipe
    output = recipe.output.path
    entry = ExportConfig(format=found.format, path=output.with_name(f"{output.name}-{found.format}"))
    progress.note(f"target {found.engine}: an export to {found.format} is added, {entry.path}")
    return recipe.model_copy(update={"export": (entry,)})


def selection(loaded: LoadedModel, quant: QuantConfig) -> Selection:
    """Return the grids that ``quant``, which has no budget, gives to a model, which may have no weights.

    Raises:
        InputError: a linear or a table cannot be quantized with its grid.
    """
    linears, tables = selected(loaded, quant)
    shapes = linear_shapes(loaded.blocks())
    specs = {name: spec for name, spec in linears.items() if spec is not None} | tables.specs
    planned = PlannedCheckpoint(loaded, specs, shapes | tables.shapes, tables)
    return Selection(_weights(linears, tables, shapes), planned)


def _weights(linears: dict[str, QuantSpec | None], tables: Tables, shapes: dict[str, tuple[int, int]]) -> Weights:
    embedding = tables.embeddings[0].spec if tables.embeddings else None
    return Weights(linears, embedding, tables.head.spec if tables.head else None, shapes)


def loads(recipe: Recipe, found: Selection) -> Verdict:
    """Return the verdict of the recipe's target: on the best of the recipe's exports, or of all formats."""
    assert recipe.target is not None
    engine, named = recipe.target.engine, tuple(entry.format for entry in recipe.export)
    nearest = best(engine, found.weights, named or None)
    if nearest.format not in formats_of(engine):  # the engine reads none of the exports
        return nearest
    others = [row for row in READS if row.engine == engine and row.format != nearest.format]
    tried = [row.format for row in others if (row.format in named if named else not row.on_request)]
    for name in (nearest.format, *tried):
        each = checked(engine, name, found)
        if each.loads:
            return each
        if name == nearest.format:
            nearest = each
    return nearest


def checked(engine: str, format: str, found: Selection) -> Verdict:
    """Return the verdict on a format: of the facts about the engine, then of the exporter."""
    said = verdict(engine, format, found.weights)
    if format not in ("native", *catalog.export_formats()):
        return said._replace(reasons=(f"this version of qtool writes no {format}",))
    if not said.loads or format == "native":
        return said
    entry = ExportConfig.model_construct(format=format, path=found.planned.folder, dtype="auto")
    reason = _base.refusal(format, found.planned, entry)
    return said if reason is None else said._replace(reasons=(reason,))


def refusal(recipe: Recipe, found: Verdict) -> str:
    """Return the message that the target does not load the result: why, and what it loads."""
    assert recipe.target is not None
    engine = recipe.target.engine
    head = f"target: {engine} does not load this recipe's result as {found.format}:"
    written = {"native", *catalog.export_formats()}
    rows = [row for row in READS if row.engine == engine and not row.on_request and row.format in written]
    return listing(head, [*found.reasons, f"{engine} loads:", *(f"  {row.format} with {allowed(row)}" for row in rows)])


def _check_named(recipe: Recipe) -> None:
    """Refuse a recipe of ``model.free`` whose exports the target does not read: which linears there are is not known.

    Raises:
        InputError: there is no export, or none is read.
    """
    assert recipe.target is not None
    engine, named = recipe.target.engine, [entry.format for entry in recipe.export]
    found = best(engine, Weights({"each linear": recipe.quant.spec_for("each linear")}), named or None)
    if not named:
        raise InputError(f"target: {engine} with model.free needs an export in the recipe; for example {found.format}")
    if not found.loads:
        raise InputError(refusal(recipe, found))


def _widest(quant: QuantConfig) -> QuantConfig:
    return quant if quant.budget is None else _at(quant, max(quant.budget.choices))


def _at(quant: QuantConfig, width: int) -> QuantConfig:
    """Return ``quant`` without its budget, and with one width for all that the budget chooses for."""
    assert quant.budget is not None
    budget = quant.budget.model_copy(update={"choices": (width,), "pins": {}})
    return narrowest(quant.model_copy(update={"budget": budget}))


def _narrowed(recipe: Recipe, loaded: LoadedModel, budget: BudgetConfig) -> Recipe:
    """Return the recipe with the widths of its budget that the target loads.

    Raises:
        InputError: it loads none of them, or not all that the recipe states itself.
    """
    assert recipe.target is not None
    stated = "choices" in budget.model_fields_set
    found: dict[int, Verdict] = {
        width: loads(recipe, selection(loaded, _at(recipe.quant, width))) for width in budget.choices
    }
    held = tuple(width for width, each in found.items() if each.loads)
    wrong = {width: each for width, each in found.items() if not each.loads}
    pinned = sorted({*budget.pins.values()} - {*held})
    if not held or (stated and wrong) or pinned:
        width = next(iter(wrong), pinned[0] if pinned else 0)
        each = wrong.get(width) or loads(recipe, selection(loaded, _at(recipe.quant, width)))
        if not each.loads:
            raise InputError(f"quant.budget, {width} bits: {refusal(recipe, each)}")
    if wrong:
        widths = ", ".join(map(str, held))
        progress.note(f"target {recipe.target.engine}: quant.budget.choices are {widths}, the widths that it loads")
    quant = recipe.quant.model_copy(update={"budget": budget.model_copy(update={"choices": held})})
    return recipe.model_copy(update={"quant": quant})
