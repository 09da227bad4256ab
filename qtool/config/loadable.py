"""Whether an engine loads a checkpoint in a format, and why not, by the grids and the facts of ``engines.py``.

Nothing else is needed, so that it is known before weights are read. A format can still be refused for reasons that the
grids do not show, such as an architecture that its engine lacks; its exporter says those.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from qtool.config.engines import ENGINES, FORMATS, READS, Grids, Reads, formats_of, reads
from qtool.config.grids import BLOCK_GRIDS
from qtool.config.quant import ActivationGrid, QuantSpec

SHOWN = 3  # most kinds of linears in a line
INT8 = ActivationGrid(num_bits=8, symmetric=True)
# the linears that engines make one matrix of, by the last parts of their names
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)


class Weights(NamedTuple):
    """The grids of a checkpoint."""

    linears: Mapping[str, QuantSpec | None]
    """The grid of each linear of the decoder blocks by full name; ``None``: it stays in floating point."""
    embedding: QuantSpec | None = None
    head: QuantSpec | None = None
    """The grid of an output head that has a table of its own."""
    shapes: Mapping[str, tuple[int, int]] = {}
    """``(out, in)`` of linears, as far as they are known."""


class Verdict(NamedTuple):
    """The answer whether an engine loads weights in a format, with the reasons if it does not."""

    engine: str
    format: str
    reasons: tuple[str, ...]
    """Why it does not, each with the key to change; empty if it does."""

    @property
    def loads(self) -> bool:
        """True if the engine loads them."""
        return not self.reasons


def verdict(engine: str, format: str, weights: Weights) -> Verdict:
    """Return whether ``engine`` loads ``weights`` that are written as ``format``."""
    row = reads(engine, format)
    if row is None:
        found = formats_of(engine)
        return Verdict(engine, format, (f"{engine} reads no {format}; it reads {', '.join(found)}",))
    return Verdict(engine, format, tuple(dict.fromkeys(_reasons(row, weights))))


def verdicts(weights: Weights) -> list[Verdict]:
    """Return the verdict on each pair of an engine and a format that it reads, in the order of the table."""
    return [verdict(row.engine, row.format, weights) for row in READS]


def best(engine: str, weights: Weights, among: Sequence[str] | None = None) -> Verdict:
    """Return the verdict on the format that ``engine`` reads best, of those that it loads; else on the nearest one.

    ``among`` are the formats to choose from, by default all but those that a user must ask for (``Reads.on_request``).
    """
    known = formats_of(engine)
    rows = [row for row in READS if row.engine == engine]
    candidates = [row.format for row in rows if (not row.on_request if among is None else row.format in among)]
    found = [verdict(engine, name, weights) for name in candidates]
    if not found:
        named = ", ".join(among or ())
        return Verdict(engine, named, (f"{engine} reads none of {named}; it reads {', '.join(known)}",))
    return next((each for each in found if each.loads), min(found, key=lambda each: len(each.reasons)))


def _reasons(row: Reads, weights: Weights) -> Iterator[str]:
    packed = {name: spec for name, spec in weights.linears.items() if spec is not None}
    holder, tables = FORMATS[row.format], dict[str, QuantSpec | None]()
    if holder.embedding and row.embedding:  # else one reason is enough
        tables["the embedding"] = weights.embedding
    if holder.head and row.head:
        tables["the head"] = weights.head
    everything = packed | {name: spec for name, spec in tables.items() if spec is not None}
    for spec in dict.fromkeys(everything.values()):
        yield from _of_grid(row, spec)
    yield from _of_sizes(row, everything, weights.shapes)
    yield from _of_tables(row, weights, packed)
    if row.engine in ENGINES and ENGINES[row.engine].fused and row.format != "dense":
        yield from unfused(weights.linears)
    if not holder.mixed and len({_weight_grid(spec) for spec in packed.values()}) > 1:
        labels = sorted({spec.label() for spec in packed.values()})
        yield f"one grid for all linears, and they have {_listed(labels, 'and')}: leave out quant.overrides"
    if not holder.mixed and (odd := _left_in_some_blocks(weights.linears)) is not None:
        yield f"no linear in floating point that another block has packed, such as {odd}: skip it in all blocks or none"
    if not holder.asymmetric_experts:
        odd = next((name for name, spec in packed.items() if ".experts" in name and not spec.symmetric), None)
        if odd is not None:
            yield f"no zero points of experts, such as {odd}: give quant.symmetric: true"


def _of_grid(row: Reads, spec: QuantSpec) -> Iterator[str]:
    """Yield what an engine or a format lacks of a grid besides bits and groups, with the key that would change that."""
    holder = FORMATS[row.format]
    if spec.float_zero and not holder.float_zeros:
        yield "no zero points between codes: give quant.float_zero: false"
    if spec.scale_dtype not in holder.scale_dtypes:
        found = _listed(holder.scale_dtypes)
        yield f"scales of {spec.scale_dtype} may not fit: give quant.scale_dtype: {found}"
    if spec.kv_cache is not None and not holder.any_activations:
        yield "no rounding of keys and values: leave out quant.kv_cache"
    if spec.activations is not None and not holder.any_activations:
        yield from _of_inputs(row, spec)
    if spec.blocks is not None and not (holder.k_quants and row.k_quants):
        yield f"no grid {spec.grid}: give quant.grid: affine"


def _of_sizes(row: Reads, specs: Mapping[str, QuantSpec], shapes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Yield which weights have bits, symmetry, groups or sizes that an engine does not read in a format."""
    wrong: dict[str, list[str]] = {}
    holder = FORMATS[row.format]
    for name, spec in specs.items():
        shape = shapes.get(name)
        found = ([*holder.grids], [*row.grids])
        if spec.blocks is None and not all(any(_holds(grid, spec, shape) for grid in each) for each in found):
            wrong.setdefault(spec.label(), []).append(name)
        if shape is not None and any(size % holder.alignment for size in shape):
            yield f"{name} is {shape[0]} x {shape[1]}, and multiples of {holder.alignment} are needed: skip it"
    for label, names in wrong.items():
        kinds = list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in names))
        more = f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else ""
        are = "are" if len(kinds) > 1 else "is"
        yield f"{', '.join(kinds[:SHOWN])}{more} {are} {label}: give {allowed(row)}"


def _of_inputs(row: Reads, spec: QuantSpec) -> Iterator[str]:
    """Yield why an engine does not round the inputs of a linear as its grid says."""
    int8 = "quant.activations: {num_bits: 8, symmetric: true}"
    if not FORMATS[row.format].int8 or not row.int8:
        yield "no rounding of inputs: leave out quant.activations"
    elif spec.activations != INT8:
        yield f"inputs are rounded to {spec.activations} bits, and the engine computes 8 symmetric ones: give {int8}"
    elif not any(_holds(grid, spec, None) for grid in row.int8):
        found = " or ".join(map(described, row.int8))
        yield f"inputs of 8 bits are multiplied by weights with {found} only: leave out quant.activations"


def _of_tables(row: Reads, weights: Weights, packed: Mapping[str, QuantSpec]) -> Iterator[str]:
    holder = FORMATS[row.format]
    if weights.embedding is not None and not (holder.embedding and row.embedding):
        yield "no quantized embedding: give quant.embedding: float"
    if weights.head is None:
        return
    if not (holder.head and row.head):
        yield "no quantized head: give quant.head: float"
    grids = {_weight_grid(spec) for spec in packed.values()}
    if row.head == "as linears" and grids != {_weight_grid(weights.head)}:
        yield "a head with the bits and groups of the linears only: give quant.head these, or float"


def _weight_grid(spec: QuantSpec) -> tuple[object, ...]:
    return spec.grid, spec.num_bits, spec.group_size, spec.symmetric


def _left_in_some_blocks(linears: Mapping[str, QuantSpec | None]) -> str | None:
    """Return the first linear in floating point whose name within its block is that of a packed one."""
    kinds = {name: re.sub(r"^.*?\.\d+\.", "", name) for name in linears}
    packed = {kinds[name] for name, spec in linears.items() if spec is not None}
    return next((name for name, spec in linears.items() if spec is None and kinds[name] in packed), None)


def unfused(linears: Mapping[str, QuantSpec | None]) -> Iterator[str]:
    """Yield a reason for the first linears that become one matrix, but have different grids."""
    for name, spec in linears.items():
        before, _, last = name.rpartition(".")
        for group in (each for each in FUSED if each[0] == last):
            for other in (f"{before}.{part}" for part in group[1:]):
                if other in linears and linears[other] != spec:
                    grids = " and ".join("float" if each is None else each.label() for each in (spec, linears[other]))
                    yield (
                        f"{_listed(group, 'and')} become one matrix, and {name} and {other} have the grids {grids}: "
                        "give all of them one (quant.overrides)"
                    )
                    return


def _holds(grid: Grids, spec: QuantSpec, shape: tuple[int, int] | None) -> bool:
    """Return whether a grid is one of ``grid``; without a shape, a row has any number of columns."""
    row = spec.group_size == -1
    group = spec.group_size if not row else shape[1] if shape is not None else 0
    fits = spec.group_size in grid.sizes if grid.sizes else group % grid.multiple_of == 0
    return spec.num_bits in grid.bits and spec.symmetric in grid.symmetric and fits


def allowed(row: Reads) -> str:
    """Return the keys and values of the grids that an engine reads in a format, such as ``quant.num_bits: 4``."""
    ways = [
        ", ".join(f"quant.{key}: {values}" for key, values in _keys(grid).items())
        for grid in (row.grids if row.grids != (Grids(),) else FORMATS[row.format].grids)
    ]
    if row.format == "gguf" and row.k_quants:  # the format that engines multiply these grids in
        ways.append(f"quant.grid: {_listed([*BLOCK_GRIDS])}")
    return "; or ".join(ways)


def _keys(grid: Grids) -> dict[str, str]:
    keys = {"num_bits": _listed(grid.bits)}
    if len(grid.symmetric) == 1:
        keys["symmetric"] = str(grid.symmetric[0]).lower()
    if grid.sizes:
        keys["group_size"] = _listed(grid.sizes)
    elif grid.multiple_of > 1:
        keys["group_size"] = f"a multiple of {grid.multiple_of}, or -1 for rows of such a multiple"
    return keys


def described(grid: Grids) -> str:
    """Return grids in words, such as ``4 or 8 bits, symmetric, groups of 32, 64 or 128 or a row``."""
    parts = [f"{_listed(grid.bits)} bits"]
    if len(grid.symmetric) == 1:
        parts.append("symmetric" if grid.symmetric[0] else "asymmetric")
    sizes = [size for size in grid.sizes if size != -1]
    if sizes:
        parts.append(f"groups of {_listed(sizes)}" + (", or a row" if -1 in grid.sizes else ""))
    elif grid.sizes:
        parts.append("one group for a row")
    elif grid.multiple_of > 1:
        parts.append(f"groups of a multiple of {grid.multiple_of}")
    return ", ".join(parts)


def _listed(values: Sequence[object], word: str = "or") -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} {word} {last}" if first else last


def version_note(engine: str, version: str | None) -> str | None:
    """Return a note if ``version`` is not the one that the facts about ``engine`` are of; ``None`` if it is."""
    known = ENGINES[engine].version
    if version is None or _numbers(version)[: len(_numbers(known))] == _numbers(known):
        return None
    age = "older" if _numbers(version) < _numbers(known) else "newer"
    return (
        f"what {engine} loads is known of version {known}, and target.version is {version}, which is {age}: try the "
        "result there"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
