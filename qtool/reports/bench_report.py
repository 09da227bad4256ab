"""The report of ``qtool bench``: its schema, its table, and its conclusions from the numbers."""

from datetime import UTC, datetime
from statistics import median

from pydantic import Field

from qtool.reports.document import Document, Printable, Table
from qtool.reports.records import Count, Number, Record, Seconds
from qtool.reports.text import rate
from qtool.system.environment import environment
from qtool.system.units import size

DENSE, FAST, EXACT = "dense", "fast", "exact"
FLOAT_HEAD = "float head"
PREFILL = "prefill"
MIN_SPEEDUP = 1.05  # over the dense speed; below it the report says that low bits do not help


def decode(batch: int) -> str:
    """Return the name of the measure of decoding with ``batch`` sequences at once."""
    return f"decode, batch {batch}"


class Speed(Record):
    """The speed of one variant in one measure."""

    tokens_per_second: Number = Field(
        gt=0, description="Median of the repeats, summed over all sequences of the batch."
    )
    repeats: tuple[Number, ...] = Field(min_length=1, description="Tokens per second of each repeat.")
    num_tokens: Count = Field(description="Tokens in one repeat.")
    joules_per_token: Number | None = Field(None, description="Energy, median of the repeats; null: not measured.")

    @property
    def spread(self) -> float:
        """The fastest repeat minus the slowest, as a fraction of the median."""
        return (max(self.repeats) - min(self.repeats)) / self.tokens_per_second


def speed(num_tokens: int, seconds: list[float], joules: list[float | None]) -> Speed:
    """Summarize repeats of ``num_tokens`` tokens each."""
    known = [energy for energy in joules if energy is not None]
    return Speed(
        tokens_per_second=median(num_tokens / each for each in seconds),
        repeats=tuple(num_tokens / each for each in seconds),
        num_tokens=num_tokens,
        joules_per_token=median(known) / num_tokens if known else None,
    )


class Variant(Record):
    """One way to store and multiply the same weights."""

    name: str = Field(description="Name of the variant: dense, fast, float head or exact.")
    title: str
    linears: str = Field(description="How many linears each kernel computes, and why the others have no kernel.")
    file_bytes: Count = Field(
        description="Size of the weights on disk; for dense and float head, the size they would have."
    )
    weight_bytes: Count = Field(description="Size of the weights in memory, including the kernels' own layouts.")
    peak_bytes: int | None = Field(
        None, description="Peak memory while processing the prompt, minus memory before loading; null: unknown."
    )
    speeds: dict[str, Speed] = Field(description="Measure (prefill, and decode for each batch size) -> speed.")


class BenchReport(Record, Printable):
    """The measurements of one checkpoint, the machine, and the conclusions."""

    path: str
    label: str = Field(description="Short name of the quantization grid, e.g. w4g128.")
    dtype: str
    device: str
    threads: Count = Field(description="CPU threads of torch.")
    prompt_tokens: Count
    variants: tuple[Variant, ...]
    logit_difference: Number | None = Field(
        None, description="Largest difference of a token's logits between fast and exact, over the largest logit."
    )
    shapes: tuple[str, ...] = Field(
        (), description="One line for each shape and grid: one row times a weight in each way, and which was chosen."
    )
    energy: str = Field(description="Energy counters that were read, or why none was.")
    remarks: tuple[str, ...] = Field((), description="Further notes.")
    seconds: Seconds = 0.0
    environment: dict[str, str] = Field(default_factory=lambda: environment())
    machine: dict[str, str] = Field(
        default_factory=dict, description="Processor, cores and memory that the process may use, and GPUs."
    )
    date: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def variant(self, name: str) -> Variant:
        """Return the variant called ``name``."""
        return next(variant for variant in self.variants if variant.name == name)

    def ratio(self, name: str, measure: str) -> float:
        """Return the speed of a variant divided by the speed of the dense variant."""
        dense = self.variant(DENSE).speeds[measure].tokens_per_second
        return self.variant(name).speeds[measure].tokens_per_second / dense

    def no_help(self) -> list[str]:
        """Return a line for each measure in which the packed weights are not faster, or not smaller."""
        lines = [
            f"{measure}: low bits do not help on this machine, {self.ratio(FAST, measure):.2f} x dense"
            for measure in self.variant(FAST).speeds
            if self.ratio(FAST, measure) < MIN_SPEEDUP
        ]
        fast, dense = self.variant(FAST).peak_bytes, self.variant(DENSE).peak_bytes
        if fast is not None and dense is not None and fast >= dense:
            lines.append(f"memory: low bits do not help on this machine, {size(fast)} against {size(dense)} dense")
        return lines

    def of_head(self) -> list[str]:
        """Return a line that compares decoding with a packed head to decoding with a float head, if that was measured.

        All else is packed in both; if head and embedding are tied, both are float.
        """
        if FLOAT_HEAD not in {variant.name for variant in self.variants}:
            return []
        packed, float_ = self.variant(FAST).speeds, self.variant(FLOAT_HEAD).speeds
        ratios = [
            f"{measure} {packed[measure].tokens_per_second / float_[measure].tokens_per_second:.2f} x"
            for measure in packed
            if measure != PREFILL
        ]
        return [f"packed head against float head: {', '.join(ratios)}"]

    def legend(self) -> list[str]:
        """Return what the columns are, and what the numbers in parentheses say."""
        return [
            f"{DENSE}: weights held in {self.dtype}; {FAST}: packed weights, each multiplied by the fastest kernel of "
            f"this machine; {EXACT}: a packed weight is dequantized for each product",
            f"(1.50 x): one and a half times as many tokens/s as {DENSE}; each speed is the median of its repeats",
        ]

    def of_repeats(self) -> str:
        """Return the line on how much repeats of one measurement differ."""
        worst = max(speed.spread for variant in self.variants for speed in variant.speeds.values())
        return f"repeats of one measurement differ by up to {worst:.0%} of their median"

    def notes(self) -> list[str]:
        """Return the notes under the table."""
        fast = f"fast: {self.variant(FAST).linears}"
        lines = [*self.legend(), *self.no_help(), *self.of_head(), fast, *self.shapes]
        if self.logit_difference is not None:
            lines.append(f"the logits of fast and exact differ by {self.logit_difference:.2%} of the largest logit")
        lines.append(self.of_repeats())
        if not any(speed.joules_per_token for variant in self.variants for speed in variant.speeds.values()):
            lines.append(f"energy {self.energy}")
        return [*lines, *self.remarks]

    def title(self) -> str:
        """Return one line: the folder, the grid and the machine."""
        where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else self.device
        return f"{self.path}, {self.label}, {self.dtype} on {where}, prompt of {self.prompt_tokens} tokens"

    def rows(self) -> list[list[str]]:
        """Return the table: a header, then a row for each measure with a cell for each variant."""
        rows = [["", *(variant.title for variant in self.variants)]]
        for measure in self.variants[0].speeds:
            rows.append([f"{measure}, tokens/s", *(self._cell(variant, measure) for variant in self.variants)])
        for measure, first in self.variants[0].speeds.items():
            if first.joules_per_token is not None:
                joules = [variant.speeds[measure].joules_per_token for variant in self.variants]
                rows.append([f"{measure}, J/token", *("" if each is None else f"{each:.3g}" for each in joules)])
        peaks = [variant.peak_bytes for variant in self.variants]
        rows.append(["peak memory", *("not measured" if peak is None else size(peak) for peak in peaks)])
        rows.append(["weights in memory", *(size(variant.weight_bytes) for variant in self.variants)])
        return [*rows, ["weights on disk", *(size(variant.file_bytes) for variant in self.variants)]]

    def _cell(self, variant: Variant, measure: str) -> str:
        text = rate(variant.speeds[measure].tokens_per_second)
        return text if variant.name == DENSE else f"{text} ({self.ratio(variant.name, measure):.2f} x)"

    def document(self) -> Document:
        """Return the title, the table and its notes."""
        header, *rows = self.rows()
        align = "l" + "r" * len(self.variants)
        names = ["", *(variant.name for variant in self.variants)]
        narrow = Table(names, rows, align) if len(self.variants) > 3 else None
        table = Table(header, rows, align, narrow=narrow)
        return Document(title=self.title(), tables=[table], notes=self.notes(), environment=self.environment)
