"""The report of a run: the schema of ``report.json``, and the same as Markdown and as a table for a terminal."""

import math
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

from qtool.config import ExpectedConfig
from qtool.overlap import ALARM, RUN

if TYPE_CHECKING:
    from rich.console import Console

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"
PACKAGES = ("qtool", "torch", "transformers", "lm_eval", "datasets")


def _strict(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


# JSON has no infinity and no NaN: they are written as "inf" and "nan", and read back as what they are
Number = Annotated[float, PlainSerializer(_strict, return_type=float | str, when_used="json-unless-none")]


class Record(BaseModel):
    """A frozen part of a report; keys of other versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Metric(Record):
    """A measured number."""

    value: Number
    stderr: Number | None = Field(None, description="Standard error; null where it cannot be estimated.")
    n: int = Field(description="Observations behind it: tokens predicted, or examples.")


class TaskResult(Record):
    """One metric of one task for the model and, beside it, for the float model it was made from."""

    task: str
    metric: str
    value: Number | None = Field(description="Of the model that was evaluated; null: not measured, and note says why.")
    stderr: Number | None = None
    float_value: Number | None = Field(None, description="Of the float model, by the same code and data.")
    float_stderr: Number | None = None
    delta: Number | None = Field(None, description="value - float_value.")
    delta_stderr: Number | None = Field(None, description="Of the difference on the same windows; perplexity only.")
    higher_is_better: bool | None = None
    num_fewshot: int | None = Field(None, description="Examples in the prompt; null where there is no prompt.")
    limit: int | None = Field(None, description="Only the first N windows, or examples of each subtask.")
    n: int | None = Field(None, description="Tokens predicted, or examples.")
    detail: bool = Field(False, description="Summed up in the row of its group; left out of tables.")
    overlap: Number | None = Field(
        None,
        description=f"Share of the text's runs of {RUN} tokens that the calibration text holds; null: not measured.",
    )
    note: str = Field("", description="What a reader must know to compare this number with others.")


def task_result(
    task: str, metric: str, measured: Metric, reference: Metric | None, **fields: bool | int | float | str | None
) -> TaskResult:
    """A row from the model's number and the float model's; ``fields`` are further fields of the row."""
    row = {"task": task, "metric": metric, "value": measured.value, "stderr": measured.stderr, "n": measured.n}
    if reference is not None:
        row |= {
            "float_value": reference.value,
            "float_stderr": reference.stderr,
            "delta": measured.value - reference.value,
        }
    return TaskResult.model_validate(row | fields)


class CalibrationText(Record):
    """What a method learned from."""

    source: str
    num_samples: int
    seq_len: int


class Published(Record):
    """A published number, and ours beside it."""

    task: str
    metric: str
    value: Number = Field(description="As published.")
    source: str
    measured: Number | None = Field(None, description="Ours; null: not measured, and note says why.")
    stderr: Number | None = None
    difference: Number | None = Field(None, description="measured - value.")
    note: str = ""


def compare(expected: Iterable[ExpectedConfig], results: Sequence[TaskResult]) -> tuple[Published, ...]:
    """Published numbers beside those of ``results``; of several tasks the plain mean."""
    return tuple(_beside(each, results) for each in expected)


def _beside(expected: ExpectedConfig, results: Sequence[TaskResult]) -> Published:
    name = expected.tasks[0] if len(expected.tasks) == 1 else f"mean of {', '.join(expected.tasks)}"
    shown = {"task": name, "metric": expected.metric, "value": expected.value, "source": expected.source}
    rows = []
    for task in expected.tasks:
        known = {row.metric: row for row in results if row.task == task}
        row = known.get(expected.metric) or (known.get("acc") if expected.metric == "acc_norm" else None)
        if row is None or row.value is None:
            reason = f"{task} was not evaluated" if not known else f"{task} has {', '.join(known)} here"
            return Published(**shown, note=row.note if row else f"not measured: {reason}")
        rows.append(row)
    measured = sum(row.value for row in rows if row.value is not None) / len(rows)
    errors = [row.stderr for row in rows if row.stderr is not None]
    stderr = math.hypot(*errors) / len(rows) if len(errors) == len(rows) else None
    limits = {f"limit {row.limit}" for row in rows if row.limit is not None}
    difference = measured - expected.value
    return Published(**shown, measured=measured, stderr=stderr, difference=difference, note=", ".join(sorted(limits)))


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
    dtype: str | None = Field(None, description="Precision of computation, of both models.")
    device: str | None = None
    backend: str | None = Field(None, description="Arithmetic of packed linears: exact or fast; null: nothing packed.")
    seed: int | None = None
    environment: dict[str, str] = Field(default_factory=lambda: environment())
    date: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def markdown(self) -> str:
        """The report as a Markdown page."""
        lines = [f"# {self.title()}", "", *(f"* {name}: {text}" for name, text in self.facts()), ""]
        for warning in self.warnings():
            lines += [f"> **Warning:** {warning}", ""]
        if self.results:
            header = ["task", "metric", *self.columns(), "shots", "n"]
            cells = [
                [row.task + self.mark(row), row.metric, *self.numbers(row, "±"), _shots(row), _count(row)]
                for row in self.shown()
            ]
            lines += _markdown_table([header, ["---"] * 2 + ["---:"] * (len(header) - 2), *cells])
        if notes := self.notes():
            lines += [*(f"{mark}. {note}" for mark, note in enumerate(notes, 1)), ""]
        if self.expected:
            header = ["task", "metric", *PUBLISHED_COLUMNS]
            cells = [[row.task, row.metric, *_published_cells(row, "±")] for row in self.expected]
            lines += _markdown_table([header, ["---"] * 2 + ["---:"] * 3 + ["---"], *cells])
        lines += ["Environment: " + ", ".join(f"{name} {text}" for name, text in self.environment.items()) + "."]
        return "\n".join(lines) + "\n"

    def render(self, console: "Console") -> None:
        """Print the report as a table that fits 80 columns."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        say = partial(console.print, markup=False, highlight=False)
        say(self.title(), style="bold")
        for name, text in self.facts():
            say(f"  {name}: {text}")
        for warning in self.warnings():
            say(f"warning: {warning}", style="bold")
        plus_minus = "±" if console.encoding.startswith("utf") else "+-"
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
                cells = (f"{each.task} {each.metric}", *_published_cells(each, plus_minus))
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

    def facts(self) -> list[tuple[str, str]]:
        """What is known of the run, as name and text."""
        facts = []
        if self.quantized:
            facts.append(("quantized model", self.quantized))
        if self.bits_per_weight is not None:
            facts.append(("bits per weight", f"{self.bits_per_weight:.3f} (scales and zero points counted)"))
        sizes = [(self.float_bytes, "float"), (self.quantized_bytes, "quantized")]
        if known := [f"{size / 1e6:.2f} MB {name}" for size, name in sizes if size is not None]:
            facts.append(("weights on disk", ", ".join(known)))
        if self.seconds:
            facts.append(("seconds", ", ".join(f"{phase} {taken:.1f}" for phase, taken in self.seconds.items())))
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
        value = "not measured" if row.value is None else _number(row.value, row.stderr, plus_minus)
        if len(self.columns()) == 1:
            return [value]
        change = _number(row.delta, row.delta_stderr, plus_minus, sign="+")
        return [_number(row.float_value, row.float_stderr, plus_minus), value, change]

    def mark(self, row: TaskResult) -> str:
        """Where the note of a row stands among ``notes()``: `` [2]``, or nothing."""
        note = _note(row)
        return f" [{self.notes().index(note) + 1}]" if note else ""

    def notes(self) -> list[str]:
        """Each different note of the rows that are shown."""
        return list(dict.fromkeys(_note(row) for row in self.shown() if _note(row)))


PUBLISHED_COLUMNS = ("published", "ours", "difference", "source")


def _published_cells(row: Published, plus_minus: str) -> list[str]:
    """A cell for each of ``PUBLISHED_COLUMNS``."""
    ours = "not measured" if row.measured is None else _number(row.measured, row.stderr, plus_minus)
    source = "; ".join(part for part in (row.source, row.note) if part)
    return [f"{row.value:.6g}", ours, _number(row.difference, None, plus_minus, sign="+"), source]


def _markdown_table(rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows] + [""]


def _note(row: TaskResult) -> str:
    """How the row was measured, in words."""
    parts = [
        "" if row.num_fewshot is None else f"{row.num_fewshot}-shot",
        "" if row.limit is None else f"limit {row.limit}",
        row.note,
    ]
    return "; ".join(part for part in parts if part)


def _shots(row: TaskResult) -> str:
    return "" if row.num_fewshot is None else str(row.num_fewshot)


def _count(row: TaskResult) -> str:
    return "" if row.n is None else str(row.n)


def _number(value: float | None, stderr: float | None, plus_minus: str, sign: str = "") -> str:
    """``34.07 ± 0.41``: two decimals, or more where the standard error deserves them."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    if stderr is None or not math.isfinite(stderr):
        return f"{value:{sign}.4g}" if abs(value) < 1e4 else f"{value:{sign}.3e}"
    decimals = 4 if stderr == 0 else min(6, max(2, 1 - math.floor(math.log10(stderr))))
    return f"{value:{sign}.{decimals}f} {plus_minus} {stderr:.{decimals}f}"


def environment() -> dict[str, str]:
    """Versions of Python, the platform and the packages that numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The name of the processor: sums in another order are other bits."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines() if known.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
