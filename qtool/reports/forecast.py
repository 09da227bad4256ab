"""What ``qtool plan`` says of a run before it runs: grids, sizes, time, memory, data, and the engines that load it."""

from typing import Any

from pydantic import Field

from qtool.reports import text
from qtool.reports.document import Document, Printable, Table
from qtool.reports.records import Count, Record, Seconds
from qtool.system.units import duration, size


class Part(Record):
    """Weights of one kind: the linears of that name in all blocks, or a table."""

    name: str
    count: Count
    grid: str = Field(description="Short name of the grid, e.g. w4g64; float: not quantized.")
    num_weights: Count
    bits_per_weight: float = Field(description="Stored bits of a weight, including scales and zero points.")
    num_bytes: Count


class Loads(Record):
    """The answer whether an engine loads the result in a format."""

    engine: str
    version: str = Field(description="The version that this is known of.")
    format: str
    loads: bool
    condition: str = Field("", description="What the scales must be for that, which is known after the run.")
    reasons: tuple[str, ...] = Field((), description="Why not, with the key to change.")
    packages: tuple[str, ...] = Field((), description="Packages that the engine needs besides itself.")
    how: str = Field(description="How it is known: run, source or docs.")
    note: str = ""


class Size(Record):
    """The size of a file, or of a folder's weight files, that a run writes."""

    name: str
    num_bytes: Count


class Data(Record):
    """The answer whether the text that a run reads can be had."""

    name: str
    there: bool
    said: str = Field(description="How much there is, or what is missing.")


class Fits(Record):
    """The answer whether a grid fits into memory beside the cache of keys and values."""

    grid: str
    bits_per_weight: float
    num_bytes: Count = Field(description="Weight files, with embedding and head in floating point.")
    with_tables: Count | None = Field(
        description="Weight files, with embedding and head at 8 bits; null: the model or the target has no such tables."
    )
    fits: bool | None = Field(None, description="The first size and the cache fit; null: no memory was named.")
    fits_with_tables: bool | None = Field(None, description="The second size and the cache fit.")
    format: str | None = Field(
        None, description="Format in which the target reads the grid best; empty: in none; null: no target was named."
    )


class Cost(Record):
    """Time and memory, as a short probe on this machine shows them."""

    seconds: dict[str, Seconds] = Field(description="Wall time by phase; evaluation and exports are not in it.")
    peak_bytes: Count = Field(description="Peak resident memory of the process, without evaluation and exports.")
    disk_bytes: Count = Field(description="Most that the run's folders hold: result, exports and hidden states.")
    probe_seconds: Seconds

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


class Forecast(Record, Printable):
    """The predicted result of a run, its time, memory and disk space."""

    model: str
    num_weights: Count = Field(description="Parameters of the float model; tied tables count once.")
    float_bytes: Count
    method: str | None = None
    label: str | None = Field(None, description="Short name of the grids.")
    target: str | None = None
    parts: tuple[Part, ...] = ()
    bits_per_weight: float | None = Field(None, description="Average of the quantized linears of the blocks.")
    file_bits_per_weight: float | None = None
    sizes: tuple[Size, ...] = Field((), description="The checkpoint's weight files, then those of each export.")
    cost: Cost | None = Field(None, description="null: no probe was made.")
    data: tuple[Data, ...] = ()
    engines: tuple[Loads, ...] = ()
    memory: Count | None = Field(None, description="Memory of the machine that will serve the model, in bytes.")
    context: Count | None = None
    cache_bytes: Count | None = Field(None, description="Keys and values of one text of that many tokens.")
    cache_layers: dict[str, Count] = Field(default_factory=dict, description="Layers of each kind in the cache.")
    grids: tuple[Fits, ...] = ()
    refused: str | None = Field(None, description="Why the target does not load the result; null: it does.")

    @property
    def usable(self) -> bool:
        """False if the recipe's target does not load the result, or text is missing."""
        return self.refused is None and all(each.there for each in self.data)

    def document(self) -> Document:
        """Return the forecast as a document."""
        made = [self.label, f"by {self.method}" if self.method else None]
        return Document(
            title=f"Plan of {self.model}" + "".join(f", {each}" for each in made if each),
            facts=self._facts(),
            warnings=[line for line in (self.refused or "").splitlines() if line],
            tables=[table for table in (self._parts(), self._engines(), self._grids()) if table.rows],
            notes=self._notes(),
        )

    def _facts(self) -> list[tuple[str, str]]:
        facts = [("parameters", f"{self.num_weights:,}; {size(self.float_bytes)} in floating point")]
        if self.bits_per_weight is not None and self.file_bits_per_weight is not None:
            whole = f"; whole file {self.file_bits_per_weight:.3f}"
            facts.append(("bits per weight", f"{self.bits_per_weight:.3f} (scales and zero points counted){whole}"))
        facts += [(f"size, {each.name}", f"{each.num_bytes / 1e6:,.2f} MB") for each in self.sizes]
        if self.cost is not None:
            phases = ", ".join(f"{name} {duration(taken)}" for name, taken in self.cost.seconds.items())
            facts.append(("time", f"{duration(self.cost.total)} ({phases}; without evaluation and exports)"))
            facts.append(("peak memory", f"{size(self.cost.peak_bytes)}, without evaluation and exports"))
            facts.append(("disk", size(self.cost.disk_bytes)))
        facts += [(f"text, {each.name}", each.said) for each in self.data]
        if self.cache_bytes is not None:
            kinds = " and ".join(f"{count} {kind}" for kind, count in self.cache_layers.items())
            facts.append((f"cache of {self.context:,} tokens", f"{size(self.cache_bytes)} in 16 bits ({kinds} layers)"))
        if self.target is not None:
            facts.append(("target", f"{self.target}: {'does not load it' if self.refused else 'loads it'}"))
        return facts

    def _parts(self) -> Table:
        rows = [
            [
                each.name if each.count == 1 else f"{each.name} x {each.count}",
                each.grid,
                f"{each.num_weights:,}",
                text.bits(each.bits_per_weight),
                text.megabytes(each.num_bytes),
            ]
            for each in self.parts
        ]
        return Table(["weights", "grid", "number", "bits/weight", "MB"], rows, "llrrr")

    def _engines(self) -> Table:
        rows = []
        for each in self.engines:
            packages = f" with {', '.join(each.packages)}" if each.packages else ""
            fits = ", if its scales fit" if each.condition else ""
            why = each.reasons[0] if each.reasons else f"yes{packages}{fits}"
            rows.append([f"{each.engine} {each.version}", each.format, why])
        return Table(["engine", "written as", "loads it"], rows, "lll")

    def _grids(self) -> Table:
        rows = [
            [
                each.grid,
                f"{each.bits_per_weight:.2f}",
                _marked(each.num_bytes, each.fits),
                _marked(each.with_tables, each.fits_with_tables, "none" if each.format is None else "not loaded"),
            ]
            for each in self.grids
        ]
        columns = ["linears", "bits/weight", "MB, tables float", "MB, tables 8 bits"]
        if self.grids and self.grids[0].format is not None:
            rows = [[*row, each.format or "not loaded"] for row, each in zip(rows, self.grids, strict=True)]
            return Table([*columns, f"for {self.target}"], rows, "lrrrl")
        return Table(columns, rows, "lrrr")

    def _notes(self) -> list[str]:
        notes = []
        if self.memory is not None and self.grids:
            cache = 0 if self.cache_bytes is None else self.cache_bytes
            notes.append(
                f"fits: the weights and a cache of {size(cache)} take at most {size(self.memory)}; the engine's own "
                "memory and that of a product come on top"
            )
        conditions: dict[str, list[str]] = {}
        for each in self.engines:
            if each.condition:
                conditions.setdefault(each.condition, []).append(each.format)
        notes += [
            f"if its scales fit ({', '.join(dict.fromkeys(formats))}): {condition}"
            for condition, formats in conditions.items()
        ]
        notes += [f"{each.engine}, {each.format}: {each.note}" for each in self.engines if each.loads and each.note]
        if self.cost is not None:
            notes.append(f"time and memory are extrapolated from a probe of {duration(self.cost.probe_seconds)}")
        return notes

    def plain(self) -> dict[str, Any]:
        """Return the forecast as plain data for ``--json``."""
        return self.model_dump(mode="json") | {"usable": self.usable}


def _marked(num_bytes: int | None, fits: bool | None, otherwise: str = "") -> str:
    if num_bytes is None:
        return otherwise
    return text.megabytes(num_bytes) + ("" if fits is None else ", fits" if fits else ", too large")
