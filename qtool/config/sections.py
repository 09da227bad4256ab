"""The sections of a recipe that every method shares, and ``QuantSpec``, the grid of one weight.

A leaf: pydantic only. A method's own section derives from :class:`MethodConfig` in that method's file.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, ByteSize, Field, ValidationError, model_validator

from qtool.config.budget import BudgetConfig
from qtool.config.section import Section as Section  # of this module, too, for whoever reads recipes
from qtool.system.errors import InputError

FORMAT_VERSION = 1  # of the native checkpoint
ACTIVATIONS_VERSION = 2  # of one whose linears round what they read or give, which a reader must not leave out
ACTIVATION_KEYS = ("activations", "kv_cache", "kv_group_size")
ACTIVATION_PRESETS = {"a8": (8, 8), "a8kv4": (8, 4), "a4kv4": (4, 4)}  # the first two
ScaleDtype = Literal["float32", "float16", "bfloat16"]
PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")  # of a packed linear
SCALE_BITS: dict[str, int] = {"float32": 32, "float16": 16, "bfloat16": 16}


def _check_group_size(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("use a positive number of input channels, or -1 for one group per row")
    return value


class QuantSpec(Section):
    """The grid of one weight ``[out, in]``: codes ``0 .. 2**num_bits - 1``, one scale and zero point per group.

    And to how many bits its linear rounds what it reads, and, where that is keys or values, what it gives.
    """

    num_bits: Literal[2, 3, 4, 8] = Field(4, description="Bits per code.")
    group_size: Annotated[int, AfterValidator(_check_group_size)] = Field(
        128, description="Input channels that share one scale; must divide the channels; -1: one group per row."
    )
    symmetric: bool = Field(True, description="Hold the zero point at the middle code (nothing stored for it).")
    scale_dtype: ScaleDtype = Field(
        "float16", description="What scales are stored as, and rounded to before they are used."
    )
    float_zero: bool = Field(
        False, description="Zero points may lie between codes, and are stored like scales; native and dense only."
    )
    activations: int | None = Field(
        None, ge=2, le=8, description="Bits of what linears read, ranged for each token; unset: float. Native only."
    )
    kv_cache: int | None = Field(
        None,
        ge=2,
        le=8,
        description="Bits of keys and values, ranged for each token and head; unset: float. Native only.",
    )
    kv_group_size: int | None = Field(
        None, ge=1, description="Channels of keys and values that share a range; unset: those of a head."
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if self.float_zero and self.symmetric:
            raise ValueError("float_zero: true needs symmetric: false; a symmetric grid has no zero point to store")
        if self.kv_group_size is not None and self.kv_cache is None:
            raise ValueError("kv_group_size acts only with kv_cache: give both, or neither")
        return self

    @property
    def weights_only(self) -> "QuantSpec":
        """The grid of the weight alone."""
        return QuantSpec(**self.model_dump(include=set(QuantSpec.model_fields), exclude=set(ACTIVATION_KEYS)))

    @property
    def qmin(self) -> int:
        """The lowest code, always 0."""
        return 0

    @property
    def qmax(self) -> int:
        """The highest code."""
        return int(2**self.num_bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return int(2 ** (self.num_bits - 1))

    def num_groups(self, in_features: int) -> int:
        """Groups in one row of ``in_features`` weights."""
        return 1 if self.group_size == -1 else in_features // self.group_size

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight with scales and zero points counted: ``b + (b + 16) / g``."""
        zero_bits = SCALE_BITS[self.scale_dtype] if self.float_zero else self.num_bits
        per_group = SCALE_BITS[self.scale_dtype] + (0 if self.symmetric else zero_bits)
        return self.num_bits + per_group * self.num_groups(in_features) / in_features

    def label(self) -> str:
        """The usual short name, e.g. ``w4g128``, ``w2g64 asym`` or ``w4g64 float zero``."""
        group = "pc" if self.group_size == -1 else f"g{self.group_size}"
        kind = " float zero" if self.float_zero else " asym"
        return f"w{self.num_bits}{group}" + ("" if self.symmetric else kind)


class QuantOverride(QuantSpec):
    """What is different for the linears that match a pattern; keys left out keep the section's value."""

    skip: bool = Field(False, description="Leave these linears in floating point.")

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        return self  # half a grid: the section's own keys complete it


class QuantConfig(QuantSpec):
    """How weights are quantized: one grid for all linears of the decoder blocks, and overrides by name."""

    overrides: dict[str, QuantOverride] = Field(
        default_factory=dict,
        description="Shell-style pattern of full linear names -> keys of this section that differ, or skip: true. Or a "
        "file that qtool plan wrote.",
    )
    budget: BudgetConfig | None = Field(None, description="A size, for which num_bits is chosen linear by linear.")
    preset: Literal["a8", "a8kv4", "a4kv4"] | None = Field(
        None, description="What activations and kv_cache are unless they are given: 8 and 8, 8 and 4, or 4 and 4 bits."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        preset = ACTIVATION_PRESETS.get(str(values.get("preset"))) if isinstance(values, dict) else None
        return values if preset is None else dict(zip(ACTIVATION_KEYS, preset, strict=False)) | values

    def spec_for(self, name: str) -> QuantSpec | None:
        """The grid of the linear ``name``; later patterns win; ``None`` when it stays in floating point."""
        values = self.model_dump(include=set(QuantSpec.model_fields))
        skip = False
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern):
                changes = override.model_dump(exclude_unset=True)
                skip = changes.pop("skip", skip)
                if changes.get("kv_cache", 0) is None:  # then what it was to be grouped by means nothing
                    values["kv_group_size"] = None
                values |= changes
        try:
            return None if skip else QuantSpec(**values)
        except ValidationError as error:  # one by one they are right, or they would have been refused
            raise InputError(f"quant.overrides that match {name}: {error.errors()[0]['msg']}") from None


class ModelConfig(Section):
    """Which model, in which precision, where."""

    path: str = Field(description="Local folder, hub name (org/name), or builtin:wiki-llama-3m.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of computation; auto: the checkpoint's own where the device has it, else float32.",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto: the first GPU when there is one.")


class MethodConfig(Section):
    """The base of every method's own section."""

    name: str = Field(description="The method: the name of its file in qtool/methods.")

    @property
    def data_defaults(self) -> dict[str, int]:
        """Keys of the data section that have another default under this method."""
        return {}


class DataConfig(Section):
    """Calibration text, cut into windows of equal length."""

    source: str = Field(
        "generated",
        description="generated, wikitext2, enwiki, c4, redpajama, slimpajama; alpaca or deita, of which only answers "
        "are learned; or a path to a .txt, .jsonl or .parquet file, or to tokens in .npy or .safetensors.",
    )
    num_samples: int = Field(128, ge=1, description="Number of windows.")
    seq_len: int = Field(512, ge=2, description="Tokens in a window.")
    memory_budget: ByteSize = Field(
        ByteSize(8_000_000_000),
        ge=0,
        description="Memory for hidden states, e.g. 4GB: within it they are held in the middle of a block as well; "
        "above it those are made again when needed, and at last all are kept on disk. The result is the same.",
    )


class EvalConfig(Section):
    """What is measured after quantization, for the quantized model and the float one."""

    tasks: tuple[str, ...] = Field(
        ("wikitext2",),
        min_length=1,
        description="wikitext2 and generated (token perplexity), kl, or any lm-eval task: boolq, mmlu.",
    )
    num_fewshot: int | dict[str, int] = Field(
        default_factory=dict, description="Examples in the prompt, for all tasks or by task; unset: the task's own."
    )
    limit: int | None = Field(None, ge=1, description="Evaluate only the first N windows or examples of a task.")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Windows or requests in one forward pass."
    )
    context: int = Field(2048, ge=2, description="Perplexity window in tokens; the model's maximum when that is less.")
    backend: Literal["exact", "fast"] = Field(
        "exact", description="Arithmetic of packed linears; fast: this machine's kernels for inputs of few rows."
    )


# of what qtool measures itself; every other task is lm-eval's
METRICS = {"wikitext2": ("perplexity",), "generated": ("perplexity",), "kl": ("kl", "top-1 agreement")}


class ExpectedConfig(Section):
    """A published number, to stand beside ours."""

    tasks: tuple[str, ...] = Field(min_length=1, description="The task it is of, or several whose mean it is.")
    metric: str = Field(
        description="As our report names it: perplexity, acc; acc_norm stands for acc where a task has no other."
    )
    value: float = Field(allow_inf_nan=False, description="The published number; a share, not per cent: 0.6014.")
    source: str = Field(min_length=1, description="Where it was published, e.g. arXiv 2406.06385, Table 4.")

    @model_validator(mode="after")
    def _one_of_ours(self) -> Self:
        for task in self.tasks:
            if self.metric not in METRICS.get(task, (self.metric,)):
                raise ValueError(f"{task} has no metric {self.metric!r}; it has {', '.join(METRICS[task])}")
        if self.metric.startswith("acc") and not 0 <= self.value <= 1:
            raise ValueError(f"accuracies are shares: write {self.value / 100:.4g} for {self.value:g} %")
        return self


class ExportConfig(Section):
    """One export written after quantization."""

    format: str = Field(description="The export format: the name of its file in qtool/export.")
    path: Path = Field(description="Folder to write; must not exist unless output.overwrite is set.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of tensors that stay in floating point; auto: the smallest that holds every value exactly."
    )


class OutputConfig(Section):
    """Where the checkpoint goes."""

    path: Path = Field(description="Folder to write; it appears under this name only when complete.")
    overwrite: bool = Field(False, description="Replace an existing folder.")
    plots: bool = Field(False, description="Write the figures of report.html also as PNG and SVG files, in plots/.")


BITS: tuple[int, ...] = get_args(QuantSpec.model_fields["num_bits"].annotation)
# keys that change no bit of a result
IMMATERIAL = ("memory_budget", "save_every", "tracker", "gradient_checkpointing")
