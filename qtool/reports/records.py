"""The records that reports are made of, and published numbers beside ours."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)

from qtool.config.sections import ExpectedConfig
from qtool.system import paths
from qtool.system.printable import without_secrets

OVERLAP_TOKENS = 13  # tokens of a run of text that counts as known
OVERLAP_WARNING = 0.01  # share of known runs from which a report warns


def _strict(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _number(value: object) -> object:
    return float(str(value)) if value in ("inf", "-inf", "nan") else value


def _file_name(name: str) -> str:
    if not name.strip(".") or "/" in name or "\\" in name or paths.text_fault(name):
        raise ValueError("should be the name of a file, not a path")
    return name


def _file_path(path: str) -> str:
    for part in path.split("/"):
        _file_name(part)
    return path


# JSON has no infinity and no NaN: they are written as "inf" and "nan", and read back as what they are
Number = Annotated[
    float,
    BeforeValidator(_number),
    PlainSerializer(_strict, return_type=float | str, when_used="json-unless-none"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}),
]
Count = Annotated[int, Field(ge=0, lt=2**63)]  # a number of things or bytes
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(_file_name)]
FilePath = Annotated[str, AfterValidator(_file_path)]  # of a file below a folder, with "/"


class Record(BaseModel):
    """A frozen part of a report; keys of other versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def json_text(self) -> str:
        """Return the record as a JSON file in ASCII, without secrets."""
        return json.dumps(without_secrets(self.model_dump(mode="json")), indent=2) + "\n"


class Planned(Record):
    """What ``qtool plan --keep`` predicted of a run."""

    num_bytes: Count = Field(description="Weight files of the checkpoint.")
    peak_bytes: Count = Field(description="Peak memory, without evaluation and exports.")
    seconds: dict[str, Seconds] = Field(description="Wall time by phase, without evaluation and exports.")


class Metric(Record):
    """A measured number."""

    value: Number
    stderr: Number | None = Field(None, description="Standard error; null where it cannot be estimated.")
    n: Count = Field(description="Number of observations: predicted tokens, or examples.")


class TaskResult(Record):
    """One metric of one task for the model and, beside it, for the float model it was made from."""

    task: str
    metric: str
    value: Number | None = Field(description="Value of the evaluated model; null: not measured, and note says why.")
    stderr: Number | None = None
    float_value: Number | None = Field(None, description="Value of the float model, by the same code and data.")
    float_stderr: Number | None = None
    delta: Number | None = Field(None, description="value - float_value.")
    delta_stderr: Number | None = Field(
        None,
        description="Standard error of delta, from the differences on the same windows or items; null: unknown.",
    )
    higher_is_better: bool | None = None
    num_fewshot: Count | None = Field(None, description="Examples in the prompt; null where there is no prompt.")
    limit: Count | None = Field(None, description="Limit of windows, or of examples of each subtask; null: none.")
    num_subtasks: Count | None = Field(
        None, description="Number of subtasks of a group, each with the limit, that the number is of; null: no group."
    )
    n: Count | None = Field(None, description="Number of predicted tokens, or of examples.")
    detail: bool = Field(False, description="Whether its group has a row for all; then tables leave it out.")
    overlap: Number | None = Field(
        None,
        description=f"Share of the text's sequences of {OVERLAP_TOKENS} tokens that the calibration text contains; "
        "null: not measured.",
    )
    note: str = Field("", description="Facts needed to compare this number with others.")
    windows: tuple[Number, ...] = Field(
        (),
        description="Mean over the predictions of each window of text: negative log-likelihood of a perplexity, KL "
        "divergence, or agreement. Models that read the same windows are compared window by window.",
    )
    text: Sha256 | None = Field(None, description="SHA-256 of the tokens of the windows; null: no windows.")


def task_result(
    task: str,
    metric: str,
    measured: Metric,
    reference: Metric | None,
    **fields: bool | int | float | str | Sequence[float] | None,
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


def change_error(row: TaskResult) -> float | None:
    """Standard error of a row's change: from the differences if it is known, else as if both were independent."""
    if row.delta_stderr is not None:
        return row.delta_stderr
    if row.stderr is None or row.float_stderr is None:
        return None
    return math.hypot(row.stderr, row.float_stderr)


class CalibrationText(Record):
    """The text that calibrated a method."""

    source: str
    num_samples: Count
    seq_len: Count
    rendering: str | None = Field(
        None, description="How conversations were written as text; null: there are none, or it is unknown."
    )
    num_learned: Count | None = Field(
        None, description="Tokens that training on next tokens learns; null: all of them, or it is unknown."
    )

    @property
    def said(self) -> str:
        """The size of the text, and of conversations what is learned and how they were written."""
        shape = f"{self.source}, {self.num_samples} windows of {self.seq_len} tokens"
        if self.num_learned is None:
            return shape
        whole = self.num_samples * self.seq_len
        learned = f"{self.num_learned:,} of {whole:,} tokens count in the loss of a training"
        written = "" if self.rendering is None else f"; conversations written by {self.rendering}"
        return f"{shape}: {learned}{written}"


class Continuation(Record):
    """What a model and the float model it was made from write after the same prompt: the most likely tokens."""

    prompt: str
    text: str = Field(description="Text of the evaluated model.")
    num_tokens: Count = Field(description="Number of tokens of text, a token that ends the text included.")
    float_text: str | None = Field(None, description="Text of the float model; null: there is none to compare with.")
    num_same: Count | None = Field(None, description="First tokens that both texts have in common; null: likewise.")


class Published(Record):
    """A published number, and ours beside it."""

    task: str
    metric: str
    value: Number = Field(description="Published value.")
    source: str
    measured: Number | None = Field(None, description="Value measured here; null: not measured, and note says why.")
    stderr: Number | None = None
    difference: Number | None = Field(None, description="measured - value.")
    note: str = ""


class Lock(BaseModel):
    """Everything that the bytes of a quantized model depend on; a run that was begun with another lock is refused."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    model: dict[str, JsonValue] = Field(
        description="Section model of the recipe, without keys that do not change the result."
    )
    method: dict[str, JsonValue] = Field(
        description="Section method of the recipe, without keys that do not change the result."
    )
    quant: dict[str, JsonValue] = Field(
        description="Section quant of the recipe, without keys that do not change the result."
    )
    data: dict[str, JsonValue] = Field(
        description="Section data of the recipe, without keys that do not change the result."
    )
    seed: Count
    model_files: dict[str, str] = Field(description="SHA-256 of the float model's files.")
    versions: dict[str, str] = Field(description="Versions of the packages that affect the result.")
    processor: str = Field(description="CPU model name: CPUs differ in the order of sums, and so in bits.")
    threads: Count
    processes: Count


EXPERT_TOKENS = "expert_tokens"  # name of the series with the calibration tokens that each expert of a block saw


class Series(Record):
    """Numbers that a method recorded, one for each block, expert, training step or validation."""

    name: str
    per: Literal["block", "expert", "step", "validation"] = Field(
        description="Whether there is one value per block, expert of a block, step or validation."
    )
    at: tuple[Count, ...] = Field(
        description="Index of the block, or number of steps done, for each value; a head that the method quantizes is "
        "one more block, after the last."
    )
    values: tuple[Number, ...]

    @model_validator(mode="after")
    def _one_value_each(self) -> Self:
        if len(self.at) != len(self.values):
            raise ValueError(f"at has {len(self.at)} entries and values has {len(self.values)}")
        return self


class Linear(Record):
    """A linear inside a decoder block."""

    name: str
    shape: tuple[Count, Count] = Field(description="Output and input channels.")
    num_bits: Annotated[int, Field(ge=1, le=32)] | None = Field(
        None, description="Width of its codes; null: it stays in floating point."
    )
    grid: str = Field("", description="Short name of the grid, e.g. w4g128.")
    float_bytes: Count | None = Field(
        None, description="Size in the weight files of a linear that stays in floating point; null: quantized, unknown."
    )
    weight_error: Number | None = Field(
        None,
        description="|Q(w) - w|**2 / |w|**2 with w the float weight, or what a method made of it before it was rounded "
        "(the scales of AWQ and SmoothQuant are part of w); null: not recorded.",
    )


class ModelTable(Record):
    """An embedding or the output head of a model; a head that computes with the embedding is one with it."""

    name: str
    role: str = Field(description="embedding, head, embedding and head (tied), or embedding with the end of its name.")
    shape: tuple[Count, Count] = Field(description="Rows, one for each token or position, and channels.")
    num_bits: Annotated[int, Field(ge=1, le=32)] | None = Field(
        None, description="Width of its codes; null: it stays in floating point."
    )
    grid: str = Field("", description="Short name of the grid, e.g. w8pc; in floating point the dtype, e.g. bfloat16.")
    bits_per_weight: float = Field(ge=0, le=64, description="Average, including scales and zero points.")
    num_bytes: Count = Field(description="Size in the weight files, scales and zero points included.")
    weight_error: Number | None = Field(None, description="|Q(w) - w|**2 / |w|**2; null: not recorded.")
    int8_bytes: Count | None = Field(
        None, description="Size that it would have in 8 bits, with one scale per row; null: is or cannot be quantized."
    )


class Exported(Record):
    """An export, and what reading it back showed."""

    format: str
    path: str
    num_bytes: Count = Field(description="Size of the weights on disk, in bytes.")
    weight_difference: Number = Field(description="Largest absolute difference of a weight after reading back.")
    logit_difference: Number | None = Field(
        description="Largest difference of logits on fixed tokens, relative to the largest logit; null: no class of "
        "transformers computes them."
    )
    notes: tuple[str, ...] = ()
    loading: str = Field("", description="Software that loads the export.")


def beside_published(expected: Iterable[ExpectedConfig], results: Sequence[TaskResult]) -> tuple[Published, ...]:
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
