"""The report of a run: the schema of ``report.json``, and its content as a document."""

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic.json_schema import GenerateJsonSchema

from qtool.reports import parts, quality, samples, serving
from qtool.reports.base_card import BaseCard
from qtool.reports.bench_report import BenchReport
from qtool.reports.document import Code, Document, Printable, Table
from qtool.reports.expert_tokens import coverage
from qtool.reports.gate import GateVerdict
from qtool.reports.records import (
    OVERLAP_TOKENS,
    CalibrationText,
    Continuation,
    Count,
    Exported,
    Linear,
    Lock,
    ModelTable,
    Planned,
    Published,
    Record,
    Seconds,
    Series,
    TaskResult,
)
from qtool.reports.text import PUBLISHED_COLUMNS, machine_in_words, metric_name, note_of, number, published_cells
from qtool.system import reading
from qtool.system.environment import environment
from qtool.system.units import duration, file_size, size
from qtool.system.writing import write_text

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"
PLOTS_FOLDER = "plots"  # folder of the figures as files, beside the report
SCHEMA_VERSION = 1


def _readable(version: int) -> int:
    if version > SCHEMA_VERSION:
        raise ValueError(f"should be at most {SCHEMA_VERSION}: a newer qtool wrote it; update qtool to read it")
    return version


class Report(Record, Printable):
    """The settings, sizes and measured quality of a run."""

    schema_version: Annotated[int, Field(ge=1), AfterValidator(_readable)] = Field(
        SCHEMA_VERSION,
        description="Version of this schema. It rises when a key is removed or gets another meaning, not when one is "
        "added.",
        json_schema_extra={"const": SCHEMA_VERSION},
    )
    model: str = Field(description="The float model, as named by the user.")
    quantized: str | None = Field(
        None, description="Folder of the quantized model; null: only the float model was evaluated."
    )
    label: str | None = Field(None, description="Short name of the quantization grid, e.g. w4g128.")
    method: str | None = None
    bits_per_weight: float | None = Field(
        None, ge=0, le=64, description="Average of the quantized linears, including scales and zero points."
    )
    file_bits_per_weight: float | None = Field(
        None, ge=0, le=64, description="Bits of all weight files for each weight of the float model; null: unknown."
    )
    float_bytes: Count | None = Field(
        None, description="Size of the float model's weights in the dtype of its files, without headers."
    )
    quantized_bytes: Count | None = Field(None, description="Size of the quantized model's weights on disk.")
    seconds: dict[str, Seconds] = Field(default_factory=dict, description="Wall time by phase.")
    calibration: CalibrationText | None = Field(
        None, description="Text that the method learned from; null: none, or unknown."
    )
    results: tuple[TaskResult, ...] = ()
    gate: GateVerdict | None = Field(
        None, description="Verdict of the recipe's quality gate; null: the recipe sets no limit."
    )
    continuations: tuple[Continuation, ...] = Field(
        (), description="Text that the model writes after fixed prompts, beside the float model's."
    )
    expected: tuple[Published, ...] = Field((), description="Published numbers that the recipe names, beside ours.")
    linears: tuple[Linear, ...] = Field((), description="The linears of all decoder blocks, in model order.")
    tables: tuple[ModelTable, ...] = Field((), description="The embeddings and the output head.")
    series: tuple[Series, ...] = Field((), description="What the method recorded of each block, step or validation.")
    peak_bytes: dict[str, Count] = Field(
        default_factory=dict,
        description="Peak resident memory of the process up to the end of each phase, including mapped files.",
    )
    peak_gpu_bytes: dict[str, Count] = Field(
        default_factory=dict, description="Peak memory allocated by torch on one GPU, likewise."
    )
    planned: Planned | None = Field(None, description="What qtool plan --keep predicted; null: nothing was kept.")
    exports: tuple[Exported, ...] = ()
    bench: BenchReport | None = Field(
        None, description="Speed and memory, by qtool bench --report; null: not measured."
    )
    command: str | None = Field(None, description="Command of qtool that runs the recipe, e.g. ptq.")
    recipe: str | None = Field(None, description="The recipe as YAML.")
    lock: Lock | None = Field(None, description="What the bytes of the quantized model depend on.")
    dtype: str | None = Field(None, description="Precision of computation, for both models.")
    device: str | None = None
    backend: str | None = Field(
        None, description="Arithmetic of packed linears, by its name: exact, fast, ort, ...; null: no packed linears."
    )
    seed: Count | None = None
    base_card: BaseCard = Field(BaseCard(), description="What the model card carries over from the float model's.")
    multimodal: bool = Field(False, description="The model reads pictures or sound beside text.")
    environment: dict[str, str] = Field(default_factory=lambda: environment())
    machine: dict[str, str] = Field(
        default_factory=dict, description="Processor, cores and memory that the process may use, and GPUs."
    )
    date: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def document(self) -> Document:
        """Return the headline, the facts of the run, and the tables of measured and published numbers."""
        return Document(
            title=self.title(),
            headline=self.headline(),
            facts=self.facts(),
            warnings=self.warnings(),
            tables=[
                *([results_table(self)] if self.results else []),
                *filter(None, [parts.table(self)]),
                *([_published(self)] if self.expected else []),
                *([serving.table(self.bench)] if self.bench else []),
            ],
            notes=[*parts.lines(self), *(serving.notes(self.bench) if self.bench else [])],
            samples=[*filter(None, [samples.table(self.continuations)])],
            code=self.again(),
            environment=self.environment,
        )

    def write(self, folder: Path) -> None:
        """Write ``report.json`` and ``report.md`` into ``folder``."""
        write_text(folder / JSON_NAME, self.json_text())
        write_text(folder / MARKDOWN_NAME, self.markdown())

    def title(self) -> str:
        """Return one line: the model, the method and the quantization grid."""
        done = " ".join(part for part in (self.method, self.label) if part)
        return f"{self.model}, {done}" if done else self.model

    def headline(self) -> str:
        """Return size and quality in one sentence; its words for a loss follow ``verdict.RULE``."""
        parts = []
        if self.bits_per_weight is not None:
            whole = self.file_bits_per_weight
            parts.append(
                f"{self.bits_per_weight:.2f} bits per weight" + (f" ({whole:.2f} of the file)" if whole else "")
            )
        if ratio := self.size_ratio():
            parts.append(ratio)
        if judged := quality.judgements(self.results):
            return ", ".join([*parts, "; ".join(str(each) for each in judged)])
        measured = next((row for row in self.shown() if row.value is not None), None)
        if measured is None:
            return ", ".join([*parts, "quality was not measured"])
        value = number(measured.value, measured.stderr)
        return (
            ", ".join([*parts, f"{measured.metric} {value} on {measured.task}"]) + "; not compared with a float model"
        )

    def size_ratio(self) -> str:
        """Return ``3.2 x smaller``: the quantized model's size on disk against the float model's; empty if unknown."""
        if not self.float_bytes or not self.quantized_bytes:
            return ""
        ratio = self.float_bytes / self.quantized_bytes
        return f"{ratio:.1f} x smaller" if ratio >= 1 else f"{1 / ratio:.1f} x larger"

    def quantize_peak(self) -> int:
        """Return the peak memory in bytes up to the end of quantization, else that of the whole run, else 0."""
        return self.peak_bytes.get("quantize") or max(self.peak_bytes.values(), default=0)

    def facts(self) -> list[tuple[str, str]]:
        """Return everything known of the run, as pairs of name and text."""
        facts = []
        if self.quantized:
            facts.append(("quantized model", self.quantized))
        if self.gate is not None and self.gate.passed:
            facts.append(("quality gate", self.gate.line()))
        if self.bits_per_weight is not None:
            whole = self.file_bits_per_weight
            of_file = "" if whole is None else f"; whole file {whole:.3f}"
            facts.append(("bits per weight", f"{self.bits_per_weight:.3f} (scales and zero points counted){of_file}"))
        sizes = [(self.float_bytes, "float"), (self.quantized_bytes, "quantized")]
        if known := [f"{file_size(count)} {name}" for count, name in sizes if count is not None]:
            facts.append(("weights on disk", ", ".join(known)))
        if self.seconds:
            facts.append(("time", ", ".join(f"{phase} {duration(taken)}" for phase, taken in self.seconds.items())))
        peaks = [(self.peak_bytes, ""), (self.peak_gpu_bytes, " on the GPU")]
        if held := [f"{size(max(peak.values()))}{where}" for peak, where in peaks if peak]:
            facts.append(("peak memory", ", ".join(held)))
        fast = f"with {self.backend} kernels" if self.backend not in (None, "exact") else None
        facts += self._planned()
        computed = [part for part in (self.dtype, self.device and f"on {self.device}", fast) if part]
        if computed:
            facts.append(("computed in", " ".join(computed)))
        if self.machine:
            facts.append(("machine", machine_in_words(self.machine)))
        if (seen := coverage(self.series)) is not None:
            facts.append(("calibration of experts", str(seen)))
        if self.calibration is not None:
            facts.append(("calibrated on", self.calibration.said))
        if shares := quality.overlaps(self.results):
            parts = ", ".join(f"{share:.2g} of {task}" for task, share in shares.items())
            facts.append(
                ("already in the calibration text", f"{parts} (fraction of its sequences of {OVERLAP_TOKENS} tokens)")
            )
        if agreement := samples.agreement(self.continuations):
            facts.append(("same text as the float model", agreement))
        if licence := self.base_card.license_name or self.base_card.license:
            facts.append(("licence of the float model", licence))
        return [*facts, ("date", self.date)]

    def again(self) -> list[Code]:
        """Return the recipe, and the commands that make the quantized model again; nothing if they are not known."""
        if self.recipe is None or self.command is None:
            return []
        commands = [f"qtool {self.command} recipe.yaml  # the recipe above, in a file of this name"]
        if self.quantized:
            commands.append(
                f"qtool reproduce {shlex.quote(self.quantized)}  # makes it again, and compares every tensor"
            )
        return [
            Code("Recipe", "yaml", self.recipe.rstrip()),
            Code("Make it again", "console", "\n".join(f"$ {each}" for each in commands)),
        ]

    def _planned(self) -> list[tuple[str, str]]:
        """Return the fact that says what was planned, beside what was measured of the same phases."""
        if (plan := self.planned) is None:
            return []
        phases = [name for name in plan.seconds if name in self.seconds]
        peaks = [self.peak_bytes[name] for name in phases if name in self.peak_bytes]
        pairs = [(size(plan.peak_bytes), size(max(peaks)))] if peaks else []
        if self.quantized_bytes is not None:
            pairs.insert(0, (f"{file_size(plan.num_bytes)} on disk", file_size(self.quantized_bytes)))
        if phases:
            taken = sum(self.seconds[name] for name in phases)
            pairs.append((duration(sum(plan.seconds[name] for name in phases)), duration(taken)))
        return [("planned (and measured)", ", ".join(f"{ours} ({real})" for ours, real in pairs))]

    def warnings(self) -> list[str]:
        """Return warnings of a failed gate, of evaluated text that calibrated, and of trainings without effect."""
        gate = [] if self.gate is None or self.gate.passed else [f"quality gate {self.gate.line()}"]
        text = quality.warnings(self.results, self.calibration.source if self.calibration else "")
        return [*gate, *text, *quality.unimproved(self.series)]

    def shown(self) -> list[TaskResult]:
        """Return the rows that tables show: all but the members of task groups."""
        return [row for row in self.results if not row.detail]

    def columns(self) -> list[str]:
        """Return the names of the number columns: one, or three if a float model was measured too."""
        compared = any(row.float_value is not None for row in self.results)
        return ["float", "quantized", "change"] if compared else ["value"]

    def numbers(self, row: TaskResult) -> list[str]:
        """Return a cell for each of ``columns()``."""
        value = "not measured" if row.value is None else number(row.value, row.stderr)
        if len(self.columns()) == 1:
            return [value]
        change = number(row.delta, row.delta_stderr, sign="+")
        return [number(row.float_value, row.float_stderr), value, change]

    def mark(self, row: TaskResult) -> str:
        """Return the reference of a row to its note in ``notes()``, such as `` [2]``; empty if it has no note."""
        note = note_of(row)
        return f" [{self.notes().index(note) + 1}]" if note else ""

    def notes(self) -> list[str]:
        """Return the notes of the rows that are shown, each once."""
        return list(dict.fromkeys(note_of(row) for row in self.shown() if note_of(row)))


def schema() -> dict[str, Any]:
    """Return the JSON schema of ``report.json`` as this version writes it."""
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **Report.model_json_schema(mode="serialization"),
        "title": "qtool report",
    }


def read_report(folder: Path) -> Report | None:
    """Return the report in a folder; ``None`` if it has none.

    Raises:
        InputError: its file is damaged, or is no report of qtool.
    """
    try:
        return reading.read_typed(folder / JSON_NAME, Report, "make the report again with qtool eval -o")
    except FileNotFoundError:
        return None


def results_table(report: Report) -> Table:
    """Return the table of measured numbers."""
    columns, rows, narrow = report.columns(), [], []
    for row in report.shown():
        mark, numbers = report.mark(row), report.numbers(row)
        shots, count = ("" if each is None else str(each) for each in (row.num_fewshot, row.n))
        rows.append([row.task + mark, row.metric, *numbers, shots, count])
        narrow.append([metric_name(row.task, row.metric) + mark, *numbers])
    right = "r" * len(columns)
    return Table(
        ["task", "metric", *columns, "shots", "n"],
        rows,
        f"ll{right}rr",
        footnotes=report.notes(),
        narrow=Table(["", *columns], narrow, f"l{right}"),
    )


def _published(report: Report) -> Table:
    rows = [[row.task, row.metric, *published_cells(row)] for row in report.expected]
    narrow = Table(["", *PUBLISHED_COLUMNS], [[" ".join(row[:2]), *row[2:]] for row in rows], "lrrrl")
    return Table(["task", "metric", *PUBLISHED_COLUMNS], rows, "llrrrl", narrow=narrow)
