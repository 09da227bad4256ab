"""``qtool plan`` of a recipe or a model: what a run will make, what it takes, and which engines load the result.

Of a model, ``config.json`` is enough: sizes of the usual grids, and which of them fit into a memory with the cache of a
text. Of a recipe, the grids and sizes come from ``config.json`` too, time and memory from a probe (``probe.py``).
"""

import math
import re
from collections.abc import Callable, Iterator
from itertools import groupby

import torch

from qtool.allocation import k_mixture
from qtool.allocation.plan import BitPlan
from qtool.checkpoints import sizes
from qtool.checkpoints.native import PlannedCheckpoint
from qtool.checkpoints.quantization_config import grids_label
from qtool.config.engines import ENGINES, FORMATS, READS
from qtool.config.loadable import Verdict, best, version_note
from qtool.config.quant import QuantConfig, QuantSpec, TableGrid
from qtool.config.recipe import Recipe
from qtool.config.sections import GgufConfig, ModelConfig
from qtool.config.target import TargetConfig
from qtool.data import sources
from qtool.evaluation import tasks
from qtool.exporters import _base
from qtool.models.cache_size import cache_size
from qtool.models.described import described_model
from qtool.models.loaded import LoadedModel
from qtool.pipelines import scale_dtype, target
from qtool.pipelines.checks import needs_text
from qtool.pipelines.expected import state_bytes
from qtool.pipelines.probe import probe
from qtool.pipelines.target import Selection
from qtool.reports.forecast import Cost, Data, Fits, Forecast, Loads, Part, Size
from qtool.system import progress
from qtool.system.errors import InputError
from qtool.system.tensors import dtype_name

# the grids that a model's sizes are shown for: bits and group size
GRIDS = ((8, -1), (4, 32), (4, 64), (4, 128), (3, 64), (3, 128), (2, 64), (2, 128))
TABLE = TableGrid(num_bits=8)
# scales of 8 significant bits, in float16: exact above its smallest number, 2**-24, times 2**7
SCALES_FIT = (
    "scales are stored in float16, which holds those of bfloat16 exactly from 7.63e-6 to 65280; the export refuses a "
    "checkpoint with others. With quant.scale_dtype: float16 all fit"
)


def of_recipe(
    recipe: Recipe, *, probed: bool = True, memory: int | None = None, context: int | None = None
) -> Forecast:
    """Return the forecast of a run; its recipe may have a target that does not load the result.

    Raises:
        InputError: the recipe or its model cannot be used.
    """
    refused, recipe = None, scale_dtype.chosen(recipe)
    try:
        recipe = target.applied(recipe)
    except InputError as error:
        refused = str(error)
    loaded = described_model(recipe.model)
    recipe = recipe.model_copy(update={"quant": k_mixture.quant_of(recipe, loaded), "gguf": GgufConfig()})
    found = target.selection(loaded, recipe.quant)
    planned = found.planned
    data = tuple(_data(recipe))
    made = _sizes(recipe, loaded, found)
    cost = None
    if probed and all(each.there for each in data):
        with progress.stage("probing time and memory"):
            seconds, peak, took = probe(recipe)
        disk = sum(each.num_bytes for each in made) + _states(recipe, loaded)
        cost = Cost(seconds=seconds, peak_bytes=peak, disk_bytes=disk, probe_seconds=took)
    return _of_model(loaded, memory, context, shown=memory is not None or context is not None).model_copy(
        update={
            "method": recipe.method.name,
            "label": grids_label(planned.specs, planned.tables),
            "target": None if recipe.target is None else recipe.target.said,
            "parts": tuple(_parts(loaded, found)),
            "bits_per_weight": sizes.bits_per_weight(
                planned.tables.linears(planned.specs) or planned.specs, planned.shapes
            ),
            "file_bits_per_weight": 8 * made[0].num_bytes / loaded.num_weights,
            "sizes": made,
            "cost": cost,
            "data": data,
            "engines": tuple(_engines(loaded, recipe.quant, found)),
            "refused": refused,
        }
    )


def of_budget(recipe: Recipe, plan: BitPlan) -> Forecast:
    """Return the forecast of a run with the bits that a plan chose for its budget, without a probe."""
    return of_recipe(recipe.model_copy(update={"quant": plan.applied(recipe.quant)}), probed=False)


def of_model(
    config: ModelConfig, *, engine: TargetConfig | None = None, memory: int | None = None, context: int | None = None
) -> Forecast:
    """Return the sizes of a model on the usual grids, from its ``config.json`` alone.

    Raises:
        InputError: there is no such model, or transformers makes no model of its config.
    """
    name = None if engine is None else engine.engine
    found = _of_model(described_model(config, weights=False), memory, context, name)
    if engine is None:
        return found
    if note := version_note(engine.engine, engine.version):
        progress.note(note)
    refused = None if any(each.format for each in found.grids) else f"target: {name} loads none of the usual grids"
    return found.model_copy(update={"target": engine.said, "refused": refused})


def _of_model(
    loaded: LoadedModel, memory: int | None, context: int | None, engine: str | None = None, *, shown: bool = True
) -> Forecast:
    """Return what is known of a model without a recipe."""
    weights = loaded.num_weights
    cache = None if context is None else cache_size(loaded.model, context)
    return Forecast(
        model=loaded.path,
        num_weights=weights,
        float_bytes=loaded.num_bytes,
        memory=memory,
        context=context,
        cache_bytes=None if cache is None else cache.num_bytes,
        cache_layers={} if cache is None else cache.layers,
        grids=tuple(_grids(loaded, memory, 0 if cache is None else cache.num_bytes, engine)) if shown else (),
    )


def _grids(loaded: LoadedModel, memory: int | None, cache: int, engine: str | None) -> Iterator[Fits]:
    """Yield the sizes of the model on each of ``GRIDS`` that its linears can have."""
    for bits, group in GRIDS:
        quant = QuantConfig(num_bits=bits, group_size=group)
        both = quant.model_copy(update={"embedding": TABLE})
        try:
            found = target.selection(loaded, quant)
        except InputError:  # groups that do not divide the channels
            continue
        plain = found.planned
        size = _packed_size(loaded, plain)
        loads = None if engine is None else best(engine, found.weights)
        small = _size_with_tables(loaded, both, loads)
        yield Fits(
            grid=quant.label(),
            bits_per_weight=sizes.bits_per_weight(plain.specs, plain.shapes),
            num_bytes=size,
            with_tables=small,
            fits=None if memory is None else size + cache <= memory,
            fits_with_tables=None if memory is None or small is None else small + cache <= memory,
            format=None if loads is None else loads.format if loads.loads else "",
        )


def _size_with_tables(loaded: LoadedModel, quant: QuantConfig, loads: Verdict | None) -> int | None:
    """Return the size with quantized tables; ``None`` if the model has none, or the target does not load them."""
    try:
        found = target.selection(loaded, quant)
    except InputError:
        return None
    if loads is not None and not best(loads.engine, found.weights, (loads.format,)).loads:
        return None
    return _packed_size(loaded, found.planned)


def _packed_size(loaded: LoadedModel, planned: PlannedCheckpoint) -> int:
    return sizes.planned_bytes(loaded, planned.specs, planned.shapes)


def _parts(loaded: LoadedModel, found: Selection) -> Iterator[Part]:
    """Yield the linears by kind and grid, then the tables, and all that stays in floating point."""
    planned, itemsize = found.planned, loaded.storage_dtype.itemsize
    shapes = planned.shapes
    rows = [
        (re.sub(r"^.*\.\d+\.", "", name), spec, math.prod(shapes[name]), shapes[name][1])
        for name, spec in found.weights.linears.items()
    ]
    counted = 0
    for (name, spec), group in groupby(sorted(rows, key=lambda row: (row[0], str(row[1]))), lambda row: row[:2]):
        each = list(group)
        number = sum(row[2] for row in each)
        size = sum(_bytes(spec, row[2], row[3], itemsize) for row in each)
        counted += number
        yield _part(name, len(each), spec, number, size)
    for name, spec in planned.specs.items():
        if name not in found.weights.linears:
            number = math.prod(shapes[name])
            counted += number
            yield _part(name, 1, spec, number, _bytes(spec, number, shapes[name][1], itemsize))
    rest = loaded.num_weights - counted
    yield _part("all other tensors", 1, None, rest, rest * itemsize)


def _part(name: str, count: int, spec: QuantSpec | None, number: int, size: int) -> Part:
    return Part(
        name=name,
        count=count,
        grid="float" if spec is None else spec.label(),
        num_weights=number,
        bits_per_weight=8 * size / max(1, number),
        num_bytes=size,
    )


def _bytes(spec: QuantSpec | None, number: int, columns: int, itemsize: int) -> int:
    return number * itemsize if spec is None else round(number * spec.bits_per_weight(columns) / 8)


def _sizes(recipe: Recipe, loaded: LoadedModel, found: Selection) -> tuple[Size, ...]:
    """Return the size of the checkpoint's weight files, and of those of each export."""
    planned = found.planned
    whole = _packed_size(loaded, planned)
    made = [Size(name="checkpoint", num_bytes=whole)]
    shapes, tables = planned.shapes, set(planned.tables.embeddings)
    packed = sum(
        math.prod(shapes[name]) * spec.bits_per_weight(shapes[name][1]) for name, spec in planned.specs.items()
    )
    floats = loaded.num_weights - sum(math.prod(shapes[name]) for name in planned.specs)
    own = dtype_name(loaded.storage_dtype)
    for entry in recipe.export:
        exporter, written = _base.get(entry.format), packed
        if (bits := exporter.bits) is not None:
            written = sum(
                math.prod(shapes[name]) * bits(spec, shapes[name], name in tables)
                for name, spec in planned.specs.items()
            )
        dtype = exporter.float_dtype(planned.specs.values(), own) if entry.dtype == "auto" else entry.dtype
        wider = (getattr(torch, dtype).itemsize - loaded.storage_dtype.itemsize) * floats
        made.append(Size(name=entry.format, num_bytes=whole + round((written - packed) / 8) + wider))
    return tuple(made)


def _states(recipe: Recipe, loaded: LoadedModel) -> int:
    """Return the bytes of hidden states that lie on disk, because they exceed the memory budget."""
    held = state_bytes(recipe, loaded) if needs_text(recipe) else 0
    return held if held > recipe.data.memory_budget else 0


def _data(recipe: Recipe) -> Iterator[Data]:
    """Yield whether the calibration text and the data of each task are there."""
    if needs_text(recipe):
        name, asked = f"calibration: {recipe.data.source}", f"{recipe.data.num_samples} x {recipe.data.seq_len} tokens"
        yield _checked(name, lambda: sources.check_source(recipe.data), asked)
    if recipe.eval is not None:
        evaluation = recipe.eval
        named = ", ".join(evaluation.tasks)
        limit = "all" if evaluation.limit is None else f"the first {evaluation.limit}"
        yield _checked(f"evaluation: {named}", lambda: tasks.check_tasks(evaluation), f"{limit} of each task")


def _checked(name: str, check: Callable[[], object], said: str) -> Data:
    try:
        check()
    except InputError as error:
        return Data(name=name, there=False, said=str(error))
    return Data(name=name, there=True, said=said)


def _engines(loaded: LoadedModel, quant: QuantConfig, found: Selection) -> Iterator[Loads]:
    """Yield whether each engine loads the result in each format that it reads.

    Scales of bfloat16 are exact in a format that holds float16 if none is too small or too large, which its export
    checks: such a format is judged with scales of float16, under that condition.
    """
    narrow = quant.scale_dtype == "bfloat16"
    half = target.selection(loaded, quant.model_copy(update={"scale_dtype": "float16"})) if narrow else found
    for row in READS:
        conditional = narrow and "bfloat16" not in FORMATS[row.format].scale_dtypes
        each = target.checked(row.engine, row.format, half if conditional else found)
        yield Loads(
            engine=row.engine,
            version=ENGINES[row.engine].version,
            format=row.format,
            packages=row.packages,
            how=row.how,
            note=row.note,
            loads=each.loads,
            condition=SCALES_FIT if conditional and each.loads else "",
            reasons=each.reasons,
        )
