"""The sections of a recipe that every method shares, and ``QuantSpec``, the grid of one weight.

A leaf: pydantic only. A method's own section derives from :class:`MethodConfig` in that method's file.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ByteSize, Field, model_validator

from qtool.config.section import Section as Section  # of this module, too, for whoever reads recipes

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
IGNORED = -100  # the label of a token that is not learned; cross entropy's own default


class ModelConfig(Section):
    """Which model, in which precision, where."""

    path: str = Field(description="Local folder, hub name (org/name), or builtin:wiki-llama-3m.")
    dtype: Dtype = Field(
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
    dtype: Dtype = Field(
        "auto", description="Of tensors that stay in floating point; auto: the smallest that holds every value exactly."
    )


class OutputConfig(Section):
    """Where the checkpoint goes."""

    path: Path = Field(description="Folder to write; it appears under this name only when complete.")
    overwrite: bool = Field(False, description="Replace an existing folder.")
    plots: bool = Field(False, description="Write the figures of report.html also as PNG and SVG files, in plots/.")


# keys that change no bit of a result
IMMATERIAL = ("memory_budget", "save_every", "tracker", "gradient_checkpointing")
