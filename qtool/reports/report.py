"""The report of a run: the schema of ``report.json``, and the same as Markdown and as a table for a terminal."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from qtool.reports.document import Document, Printable, Table
from qtool.reports.records import (
    ALARM,
    RUN,
    CalibrationText,
    Exported,
    Linear,
    Number,
    Published,
    Record,
    TaskResult,
    change_error,
)
from qtool.reports.text import PUBLISHED_COLUMNS, metric_name, note_of, number, percent, published_cells
from qtool.reports.verdict import relative_loss, words
from qtool.system.environment import environment
from qtool.system.units import size

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"


class Report(Record, Printable):
    """What was run, how large the result is, and how good."""

    model: str = Field(description="The float model, as the user gave it.")
    quantized: str | None = Field(
        None, description="Folder of the quantized model; null: only the float model was run."
    )
    label: str | None = Field(None, description="Grid in short, e.g. w4g128.")
    method: str | None = None
    bits_per_weight: float | None = Field(None, description="Of the quantized linears, scales and zero points counted.")
    float_bytes: int | None = Field(None, description="Weights of the float model on disk.")
    quantized_bytes: int | None = Field(None, description="Weights of the quantized model on disk.")
    seconds: dict[str, float] = Field(default_factory=dict, description="Wall time by phase.")
    calibration: CalibrationText | None = Field(None, description="null: no text, or not known.")
    results: tuple[TaskResult, ...] = ()
    expected: tuple[Published, ...] = Field((), description="Published numbers that the recipe names, and ours.")
    linears: tuple[Linear, ...] = Field((), description="Of all decoder blocks, in their order.")
    series: dict[str, tuple[Number, ...]] = Field(
        default_factory=dict, description="What the method recorded of each block, step or validation."
    )
    peak_bytes: dict[str, int] = Field(
        default_factory=dict,
        description="Most memory resident from the start of the process to the end of each phase; mapped files count.",
    )
    peak_gpu_bytes: dict[str, int] = Field(default_factory=dict, description="The same, allocated on one GPU by torch.")
    exports: tuple[Exported, ...] = ()
    lock: dict[str, Any] | None = Field(None, description="What the bytes of the quantized model depend on.")
    dtype: str | None = Field(None, description="Precision of computation, of both models.")
    device: str | None = None
    backend: str | None = Field(None, description="Arithmetic of packed linears: exact or fast; null: nothing packed.")
    seed: int | None = None
    environment: dict[str, str] = Field(default_factory=lambda: environment())
    date: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def document(self) -> Document:
        """The headline, what is known of the run, and a table of each kind of number."""
        return Document(
            title=self.title(),
            headline=self.headline(),
            facts=self.facts(),
            warnings=self.warnings(),
            tables=[*([self._results()] if self.results else []), *([self._published()] if self.expected else [])],
            environment=self.environment,
        )

    def _results(self) -> Table:
        columns, rows, narrow = self.columns(), [], []
        for row in self.shown():
            mark, numbers = self.mark(row), self.numbers(row)
            shots, count = ("" if each is None else str(each) for each in (row.num_fewshot, row.n))
            rows.append([row.task + mark, row.metric, *numbers, shots, count])
            narrow.append([metric_name(row.task, row.metric) + mark, *numbers])
        right = "r" * len(columns)
        return Table(
            ["task", "metric", *columns, "shots", "n"],
            rows,
            f"ll{right}rr",
            footnotes=self.notes(),
            narrow=Table(["", *columns], narrow, f"l{right}"),
        )

    def _published(self) -> Table:
        rows = [[row.task, row.metric, *published_cells(row)] for row in self.expected]
        narrow = Table(["", *PUBLISHED_COLUMNS], [[" ".join(row[:2]), *row[2:]] for row in rows], "lrrrl")
        return Table(["task", "metric", *PUBLISHED_COLUMNS], rows, "llrrrl", narrow=narrow)

    def write(self, folder: Path) -> None:
        """Write ``report.json`` and ``report.md`` into ``folder``."""
        (folder / JSON_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / MARKDOWN_NAME).write_text(self.markdown(), encoding="utf-8")

    def title(self) -> str:
        """One line: the model, and what was done to it."""
        done = " ".join(part for part in (self.method, self.label) if part)
        return f"{self.model}, {done}" if done else self.model

    def headline(self) -> str:
        """How small and how good it is, in a sentence whose words follow ``verdict.RULE``."""
        parts = []
        if self.bits_per_weight is not None:
            parts.append(f"{self.bits_per_weight:.2f} bits per weight")
        if self.float_bytes and self.quantized_bytes:
            ratio = self.float_bytes / self.quantized_bytes
            parts.append(f"{ratio:.1f} x smaller" if ratio >= 1 else f"{1 / ratio:.1f} x larger")
        if (quality := self.quality()) is not None:
            name, shown, where, said = quality
            return ", ".join([*parts, f"{name} {shown}" + (f" on {where}" if where else "")]) + f": {said}"
        measured = next((row for row in self.shown() if row.value is not None), None)
        if measured is None:
            return ", ".join([*parts, "quality was not measured"])
        value = number(measured.value, measured.stderr)
        return ", ".join([*parts, f"{measured.metric} {value} on {measured.task}"]) + "; no float model beside it"

    def quality(self) -> tuple[str, str, str, str] | None:
        """What the headline says of quality: metric, change, where measured, and words; ``None``: nothing compares."""
        if (judged := self.judged()) is None:
            return None
        name, where, loss, stderr = judged
        if name == "kl":
            return "KL divergence", f"{number(loss, stderr)} nats", "", words(loss, stderr)
        return name, percent(-loss if name == "accuracy" else loss, stderr), where, words(loss, stderr)

    def judged(self) -> tuple[str, str, float, float | None] | None:
        """What the headline judges by: metric, text or tasks, loss and its standard error; ``None``: nothing compares.

        Perplexity, on text that nobody generated and calibration did not hold where there is such; else KL divergence;
        else the mean accuracy over tasks.
        """
        rows = [row for row in self.shown() if self.loss(row) is not None]
        rows.sort(key=lambda row: ((row.overlap or 0) >= ALARM, row.task == "generated"))
        for metric in ("perplexity", "kl"):
            for row in rows:
                if row.metric == metric and (found := self.loss(row)):
                    return metric, row.task, *found
        tasks: dict[str, TaskResult] = {}
        for row in rows:
            if row.metric.startswith("acc"):
                tasks.setdefault(row.task, row)
        if not tasks:
            return None
        count = len(tasks)
        value, reference = (sum(getattr(row, side) for row in tasks.values()) for side in ("value", "float_value"))
        errors = [error for row in tasks.values() if (error := change_error(row)) is not None]
        stderr = math.hypot(*errors) / abs(reference) if len(errors) == count else None
        where = next(iter(tasks)) if count == 1 else f"{count} tasks"
        return "accuracy", where, relative_loss(value, reference, higher_is_better=True), stderr

    def loss(self, row: TaskResult) -> tuple[float, float | None] | None:
        """The relative loss of a row and its standard error; ``None`` where it has no float model beside it."""
        if row.value is None:
            return None
        if row.metric == "kl":
            return row.value, row.stderr
        if not row.float_value or row.higher_is_better is None:
            return None
        error = change_error(row)
        loss = relative_loss(row.value, row.float_value, row.higher_is_better)
        return loss, None if error is None else error / abs(row.float_value)

    def facts(self) -> list[tuple[str, str]]:
        """What is known of the run, as name and text."""
        facts = []
        if self.quantized:
            facts.append(("quantized model", self.quantized))
        if self.bits_per_weight is not None:
            facts.append(("bits per weight", f"{self.bits_per_weight:.3f} (scales and zero points counted)"))
        sizes = [(self.float_bytes, "float"), (self.quantized_bytes, "quantized")]
        if known := [f"{count / 1e6:.2f} MB {name}" for count, name in sizes if count is not None]:
            facts.append(("weights on disk", ", ".join(known)))
        if self.seconds:
            facts.append(("seconds", ", ".join(f"{phase} {taken:.1f}" for phase, taken in self.seconds.items())))
        peaks = [(self.peak_bytes, ""), (self.peak_gpu_bytes, " on the GPU")]
        if held := [f"{size(max(peak.values()))}{where}" for peak, where in peaks if peak]:
            facts.append(("peak memory", ", ".join(held)))
        fast = "with fast kernels" if self.backend == "fast" else None
        computed = [part for part in (self.dtype, self.device and f"on {self.device}", fast) if part]
        if computed:
            facts.append(("computed in", " ".join(computed)))
        if (text := self.calibration) is not None:
            shape = f"{text.num_samples} windows of {text.seq_len} tokens"
            facts.append(("calibrated on", f"{text.source}, {shape}"))
        if shares := self.overlaps():
            parts = ", ".join(f"{share:.2g} of {task}" for task, share in shares.items())
            facts.append(("already in the calibration text", f"{parts} (share of its runs of {RUN} tokens)"))
        return [*facts, ("date", self.date)]

    def overlaps(self) -> dict[str, float]:
        """The share of each evaluated text that the calibration text holds, once for each text."""
        shares: dict[str, float] = {}
        for row in self.results:
            if row.overlap is not None and row.overlap not in shares.values():
                shares.setdefault(row.task, row.overlap)
        return shares

    def warnings(self) -> list[str]:
        """What makes numbers of this report say something else than they seem to."""
        source = self.calibration.source if self.calibration else "the calibration text"
        return [
            f"{share:.1%} of the text of {task} is in {source} as it was used for calibration "
            f"(runs of {RUN} tokens): what is measured on it is partly memory."
            for task, share in self.overlaps().items()
            if share >= ALARM
        ]

    def shown(self) -> list[TaskResult]:
        """The rows that tables have."""
        return [row for row in self.results if not row.detail]

    def columns(self) -> list[str]:
        """Names of the columns of numbers: one, or three where a float model was measured beside."""
        compared = any(row.float_value is not None for row in self.results)
        return ["float", "quantized", "change"] if compared else ["value"]

    def numbers(self, row: TaskResult) -> list[str]:
        """A cell for each of ``columns()``."""
        value = "not measured" if row.value is None else number(row.value, row.stderr)
        if len(self.columns()) == 1:
            return [value]
        change = number(row.delta, row.delta_stderr, sign="+")
        return [number(row.float_value, row.float_stderr), value, change]

    def mark(self, row: TaskResult) -> str:
        """Where the note of a row stands among ``notes()``: `` [2]``, or nothing."""
        note = note_of(row)
        return f" [{self.notes().index(note) + 1}]" if note else ""

    def notes(self) -> list[str]:
        """Each different note of the rows that are shown."""
        return list(dict.fromkeys(note_of(row) for row in self.shown() if note_of(row)))
