"""What ``qtool verify`` found of an export: weights that other software re-read, and engines that computed with it."""

from pydantic import Field

from qtool.reports.document import Document, Printable, Table
from qtool.reports.records import Count, Number, Record

SHOWN = 10  # most differing weights that a table names


class Difference(Record):
    """A weight that differs."""

    name: str
    numbers: Count = Field(description="Count of numbers that differ.")
    largest: Number = Field(description="Largest absolute difference.")


class ReaderCheck(Record):
    """The weights of an export as a reader unpacks them, beside those of another folder."""

    reader: str = Field(description="The package that unpacked the weights; qtool: its own second reader.")
    versions: dict[str, str]
    against: str = Field(description="Name of the folder that the export was compared with.")
    kind: str = Field(description="checkpoint: every number must be equal; float model: weights must be alike.")
    weights: Count = Field(description="Count of quantized weights that were compared.")
    numbers: Count = Field(description="Count of numbers in them.")
    by_qtool: Count = Field(0, description="Count of weights that the reader did not give, and qtool read itself.")
    differing: tuple[Difference, ...] = ()
    least_cosine: Number | None = Field(None, description="Least cosine with a float weight; null: not a float model.")
    mean_error: Number | None = Field(None, description="Mean of |Q(w) - w|**2 / |w|**2; null: not a float model.")
    other_fault: str = Field("", description="Another tensor, or a key of the config, that differs.")
    missing: str = Field("", description="Why the format's independent reader was not used; empty: it was.")
    date: str = ""

    @property
    def ok(self) -> bool:
        """True if nothing differs."""
        return not self.differing and not self.other_fault

    @property
    def by(self) -> str:
        """The reader and its version."""
        own = "qtool's second reader" if self.reader == "qtool" else self.reader
        return f"{own} {self.versions.get(self.reader, '')}".strip()

    def sentence(self) -> str:
        """Return the result in one sentence."""
        if self.kind == "checkpoint":
            equal = f"{self.weights} weights, {self.numbers:,} numbers, are equal bit for bit"
        else:
            assert self.least_cosine is not None
            assert self.mean_error is not None
            equal = (
                f"{self.weights} weights resemble the float ones (least cosine {self.least_cosine:.4f}, mean relative "
                f"squared error {self.mean_error:.4g})"
            )
        faults = []
        if self.differing:
            first, how = self.differing[0], "differs" if len(self.differing) == 1 else "differ"
            faults.append(f"{len(self.differing)} of {self.weights} weights {how}, the first {first.name}")
        if self.other_fault:
            faults.append(self.other_fault)
        also = f"; {self.by_qtool} of them were read by qtool, because {self.reader} did not give them"
        return (equal if self.ok else "; ".join(faults)) + (also if self.by_qtool else "")


class EngineCheck(Record):
    """The logits and the perplexity of an export in an engine, beside torch with the same weights in float32."""

    engine: str
    versions: dict[str, str]
    python: str
    text: str = Field(description="The text: wikitext2, built-in, or the name of a file.")
    windows: Count
    context: Count = Field(description="Tokens of each window.")
    logit_difference: Number = Field(
        description="Norm of the difference of logits over the norm of torch's, less the mean of each position."
    )
    logit_tolerance: Number
    perplexity: Number
    torch_perplexity: Number
    perplexity_tolerance: Number = Field(description="Largest relative difference of the perplexities.")
    tokens_equal: bool | None = Field(
        description="Whether the engine makes the same tokens of the text; null: it takes tokens only."
    )
    load: str = Field(description="Command or Python code that loads the export in the engine; {folder} is its path.")
    language: str = Field(description="console or python.")
    date: str = ""

    @property
    def faults(self) -> list[str]:
        """The faults that were found, one line each."""
        found = []
        if not self.logit_difference <= self.logit_tolerance:
            found.append(f"logits differ by {self.logit_difference:.3g}, and {self.logit_tolerance:g} is allowed")
        if not abs(self.perplexity / self.torch_perplexity - 1) <= self.perplexity_tolerance:
            found.append(
                f"the perplexity is {self.perplexity:.4f}, and torch's {self.torch_perplexity:.4f}; a difference of "
                f"{self.perplexity_tolerance:.2%} is allowed"
            )
        if self.tokens_equal is False:
            found.append("the engine reads the text as other tokens")
        return found

    @property
    def ok(self) -> bool:
        """True if everything is within its tolerance."""
        return not self.faults

    @property
    def by(self) -> str:
        """The engine and the versions of its packages."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return versions if self.engine in self.versions else f"{self.engine} ({versions})"


class Available(Record):
    """Software that reads the format, and whether it is installed."""

    name: str
    reads: str = Field(description="weights: --against unpacks with it; engine: --engine computes with it.")
    version: str | None = Field(description="Its version; null: it is not installed.")
    install: str = Field(description="What to do if it is not installed.")


class Verification(Record, Printable):
    """All that ``qtool verify`` found of an export."""

    path: str
    format: str
    files: Count
    linears: Count
    bits_per_weight: None = None  # an export records none; of a checkpoint, the same key has a number
    embeddings: Count = 0
    software: tuple[Available, ...] = ()
    against: ReaderCheck | None = None
    engines: tuple[EngineCheck, ...] = ()

    @property
    def ok(self) -> bool:
        """True if nothing differs."""
        return not self.faults()

    def faults(self) -> list[str]:
        """Return what differs, one line each."""
        found = [] if self.against is None or self.against.ok else [f"{self.against.by}: {self.against.sentence()}"]
        return found + [f"{each.engine}: {fault}" for each in self.engines for fault in each.faults]

    def document(self) -> Document:
        """Return the result as a document: what was compared, and by which software."""
        notes = []
        if self.against is not None and self.against.missing:
            notes.append(f"weights were read by qtool's own second reader: {self.against.missing}")
        return Document(
            title=f"{self.path}, {self.format}",
            headline=f"{self.files} file(s) and {self.linears} quantized linears are as they were written",
            warnings=self.faults(),
            tables=[table for table in (self._against(), self._engines(), self._software()) if table is not None],
            notes=notes,
        )

    def _software(self) -> Table | None:
        rows = [
            [each.name, each.reads, each.version or "not installed", "" if each.version else each.install]
            for each in self.software
        ]
        columns = ["software", "used by", "version", "how to install"]
        return Table(columns, rows, "llll", "Software that reads this format") if rows else None

    def _against(self) -> Table | None:
        if self.against is None:
            return None
        rows = [[self.against.by, f"{self.against.kind} {self.against.against}", self.against.sentence()]]
        rows += [
            ["", each.name, f"{each.numbers:,} numbers differ, by up to {each.largest:.3g}"]
            for each in self.against.differing[:SHOWN]
        ]
        return Table(["read by", "compared with", "result"], rows, "lll", "Weights")

    def _engines(self) -> Table | None:
        columns = ["engine", "text", "tokens", "logits", "allowed", "perplexity", "torch", "result"]
        rows = [_engine_row(each) for each in self.engines]
        return (
            Table(columns, rows, "lllrrrrl", "Engines, beside torch with the same weights in float32") if rows else None
        )


def _engine_row(check: EngineCheck) -> list[str]:
    return [
        check.by,
        f"{check.text}, {check.windows} x {check.context} tokens",
        {True: "equal", False: "differ", None: ""}[check.tokens_equal],
        f"{check.logit_difference:.2e}",
        f"{check.logit_tolerance:g}",
        f"{check.perplexity:.4f}",
        f"{check.torch_perplexity:.4f}",
        "within tolerance" if check.ok else "differs",
    ]
