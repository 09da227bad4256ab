"""The report of a run: the schema of ``report.json``, and the same as Markdown and as a table for a terminal."""

import math
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from qtool.reports.records import (
    ALARM,
    RUN,
    CalibrationText,
    Exported,
    Linear,
    Lock,
    Published,
    Record,
    Series,
    TaskResult,
    change_error,
)
from qtool.reports.text import PUBLISHED_COLUMNS, markdown_table, note_of, number, percent, published_cells
from qtool.reports.verdict import relative_loss, words
from qtool.system.environment import environment
from qtool.system.units import size

if TYPE_CHECKING:
    from rich.console import Console

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"


class Report(Record):
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
    series: tuple[Series, ...] = Field((), description="What the method recorded of each block, step or validation.")
    peak_bytes: dict[str, int] = Field(
        default_factory=dict,
        description="Most memory resident from the start of the process to the end of each phase; mapped files count.",
    )
    peak_gpu_bytes: dict[str, int] = Field(default_factory=dict, description="The same, allocated on one GPU by torch.")
    exports: tuple[Exported, ...] = ()
    lock: Lock | None = Field(None, description="What the bytes of the quantized model depend on.")
    dtype: str | None = Field(None, description="Precision of computation, of both models.")
    device: str | None = None
    backend: str | None = Field(None, description="Arithmetic of packed linears: exact or fast; null: nothing packed.")
    seed: int | None = None
    environment: dict[str, str] = Field(default_factory=lambda: environment())
    date: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def markdown(self) -> str:
        """The report as a Markdown page."""
        lines = [
            f"# {self.title()}",
            "",
            f"**{self.headline()}**",
            "",
            *(f"* {name}: {text}" for name, text in self.facts()),
            "",
        ]
        for warning in self.warnings():
            lines += [f"> **Warning:** {warning}", ""]
        if self.results:
            header = ["task", "metric", *self.columns(), "shots", "n"]
            cells = [
                [row.task + self.mark(row), row.metric, *self.numbers(row, "±"), _shots(row), _count(row)]
                for row in self.shown()
            ]
            lines += markdown_table([header, ["---"] * 2 + ["---:"] * (len(header) - 2), *cells])
        if notes := self.notes():
            lines += [*(f"{mark}. {note}" for mark, note in enumerate(notes, 1)), ""]
        if self.expected:
            header = ["task", "metric", *PUBLISHED_COLUMNS]
            cells = [[row.task, row.metric, *published_cells(row, "±")] for row in self.expected]
            lines += markdown_table([header, ["---"] * 2 + ["---:"] * 3 + ["---"], *cells])
        lines += ["Environment: " + ", ".join(f"{name} {text}" for name, text in self.environment.items()) + "."]
        return "\n".join(lines) + "\n"

    def render(self, console: "Console") -> None:
        """Print the report as a table that fits 80 columns."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        say = partial(console.print, markup=False, highlight=False)
        plus_minus = "±" if console.encoding.startswith("utf") else "+-"
        say(self.title(), style="bold")
        say(self.headline(plus_minus))
        for name, text in self.facts():
            say(f"  {name}: {text}")
        for warning in self.warnings():
            say(f"warning: {warning}", style="bold")
        if self.results:
            table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
            table.add_column("", overflow="fold")
            for name in self.columns():
                table.add_column(name, justify="right", overflow="fold")
            for row in self.shown():
                name = row.task if row.task == row.metric else f"{row.task} {row.metric}"
                numbers = self.numbers(row, plus_minus)
                table.add_row(*(Text(cell) for cell in (name + self.mark(row), *numbers)))
            say()
            say(table)
            say()
        for mark, note in enumerate(self.notes(), 1):
            say(f"{mark}. {note}")
        if self.expected:
            table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
            for name, justify in zip(("", *PUBLISHED_COLUMNS), ("left", *["right"] * 3, "left"), strict=True):
                table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type] # both are allowed
            for each in self.expected:
                cells = (f"{each.task} {each.metric}", *published_cells(each, plus_minus))
                table.add_row(*(Text(cell) for cell in cells))
            say()
            say(table)
            say()

    def write(self, folder: Path) -> None:
        """Write ``report.json`` and ``report.md`` into ``folder``."""
        (folder / JSON_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / MARKDOWN_NAME).write_text(self.markdown(), encoding="utf-8")

    def title(self) -> str:
        """One line: the model, and what was done to it."""
        done = " ".join(part for part in (self.method, self.label) if part)
        return f"{self.model}, {done}" if done else self.model

    def headline(self, plus_minus: str = "±") -> str:
        """How small and how good it is, in a sentence whose words follow ``verdict.RULE``."""
        parts = []
        if self.bits_per_weight is not None:
            parts.append(f"{self.bits_per_weight:.2f} bits per weight")
        if self.float_bytes and self.quantized_bytes:
            ratio = self.float_bytes / self.quantized_bytes
            parts.append(f"{ratio:.1f} x smaller" if ratio >= 1 else f"{1 / ratio:.1f} x larger")
        if (quality := self.quality(plus_minus)) is not None:
            name, shown, where, said = quality
            return ", ".join([*parts, f"{name} {shown}" + (f" on {where}" if where else "")]) + f": {said}"
        measured = next((row for row in self.shown() if row.value is not None), None)
        if measured is None:
            return ", ".join([*parts, "quality was not measured"])
        value = number(measured.value, measured.stderr, plus_minus)
        return ", ".join([*parts, f"{measured.metric} {value} on {measured.task}"]) + "; no float model beside it"

    def quality(self, plus_minus: str = "±") -> tuple[str, str, str, str] | None:
        """What the headline says of quality: metric, change, where measured, and words; ``None``: nothing compares."""
        if (judged := self.judged()) is None:
            return None
        name, where, loss, stderr = judged
        if name == "kl":
            return "KL divergence", f"{number(loss, stderr, plus_minus)} nats", "", words(loss, stderr)
        return name, percent(-loss if name == "accuracy" else loss, stderr, plus_minus), where, words(loss, stderr)

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

    def numbers(self, row: TaskResult, plus_minus: str) -> list[str]:
        """A cell for each of ``columns()``."""
        value = "not measured" if row.value is None else number(row.value, row.stderr, plus_minus)
        if len(self.columns()) == 1:
            return [value]
        change = number(row.delta, row.delta_stderr, plus_minus, sign="+")
        return [number(row.float_value, row.float_stderr, plus_minus), value, change]

    def mark(self, row: TaskResult) -> str:
        """Where the note of a row stands among ``notes()``: `` [2]``, or nothing."""
        note = note_of(row)
        return f" [{self.notes().index(note) + 1}]" if note else ""

    def notes(self) -> list[str]:
        """Each different note of the rows that are shown."""
        return list(dict.fromkeys(note_of(row) for row in self.shown() if note_of(row)))


def _shots(row: TaskResult) -> str:
    return "" if row.num_fewshot is None else str(row.num_fewshot)


def _count(row: TaskResult) -> str:
    return "" if row.n is None else str(row.n)
