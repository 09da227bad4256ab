"""The sections of a recipe that every method shares.

This module needs pydantic only. A method's own section derives from :class:`MethodConfig` in that method's file.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import ByteSize, Field, field_validator, model_validator

from qtool.config.section import OutputPath, Section, text_as
from qtool.system.distribution import install

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
BackendName = Literal["exact", "fast", "dense", "torch", "ort", "gemlite"]
MAX_TOKENS = 2**31  # most calibration tokens; they are held in memory as int64
IGNORED = -100  # label of a token that is not learned; the default of torch's cross entropy


class ModelConfig(Section):
    """The model, the precision of computation, and the device."""

    path: str = Field(description="Local folder, .gguf file, hub name (org/name), or builtin:wiki-llama-3m.")
    dtype: Dtype = Field(
        "auto",
        description="Precision of computation. auto: the checkpoint's dtype if the device supports it, else float32.",
    )
    device: str = Field(
        "auto", description="Device: cpu, cuda, cuda:1, ... auto: the first GPU, or the CPU if there is none."
    )

    free: bool = Field(
        False,
        description="Quantize from the files alone, for models that transformers does not know: linears are chosen by "
        "their names, one tensor is in memory at a time. Methods rtn and hqq only, without evaluation.",
    )

    @field_validator("path", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        """Take a ``Path``, as ``output.path`` does."""
        return str(value) if isinstance(value, Path) else value


class MethodConfig(Section):
    """The base of every method's own section."""

    positive_scales: ClassVar[bool] = False
    """True if the method computes scales that cannot be negative."""

    name: str = Field(description="Name of the quantization method, e.g. gptq.")

    @property
    def data_defaults(self) -> dict[str, int]:
        """Defaults of the data section that are different for this method."""
        return {}


class DataConfig(Section):
    """Calibration text, cut into windows of equal length."""

    source: str = Field(
        "generated",
        description="generated (text that the model writes itself), wikitext2, enwiki, c4, redpajama, slimpajama; "
        "alpaca or deita, where only the answers are learned; or a path to a .txt, .jsonl, .json.gz or .parquet "
        "file, whose rows may have pictures, or to tokens in .npy or .safetensors.",
    )
    num_samples: int = Field(128, ge=1, description="Number of calibration windows.")
    seq_len: int = Field(512, ge=2, description="Tokens per window.")
    bos: bool = Field(
        False,
        description="Begin every window of plain text with the tokenizer's BOS token. Gemma and other models predict "
        "badly without it.",
    )
    memory_budget: ByteSize = Field(
        ByteSize(8_000_000_000),
        ge=0,
        description="RAM for the hidden states of the calibration text, e.g. 4GB. If the states and the paused "
        "forwards fit, each block runs once; if only the states fit, a block runs again for each group of linears; "
        "otherwise the states go to disk. The result is the same.",
    )

    @model_validator(mode="after")
    def _fits_memory(self) -> Self:
        if self.num_samples * self.seq_len > MAX_TOKENS:
            raise ValueError(
                f"num_samples times seq_len is {self.num_samples * self.seq_len:,} tokens; at most {MAX_TOKENS:,} fit"
            )
        return self


class EvalConfig(Section):
    """The evaluation of the quantized model and the float model."""

    tasks: tuple[str, ...] = Field(
        ("wikitext2", "kl"),
        min_length=1,
        description="wikitext2, c4 and generated (token perplexity), kl (KL divergence from the float model), or any "
        f"lm-eval task, e.g. boolq, mmlu ({install('tasks')}); unset, kl is left out if the float model is not known.",
    )
    num_fewshot: int | dict[str, int] = Field(
        default_factory=dict,
        description="Examples in the prompt of lm-eval tasks: one number, or task -> number; unset: the task's own.",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="Evaluate only the first N windows or examples of each task, of a group such as mmlu of each "
        "subtask; unset: all.",
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Windows or lm-eval requests in one forward pass; auto: as many as fit the memory."
    )
    context: int = Field(2048, ge=2, description="Perplexity window in tokens; at most the model's maximum.")
    bos: bool = Field(
        False,
        description="Begin every window of wikitext2, c4 and kl with the tokenizer's BOS token. The papers do not; "
        "Gemma and other models predict badly without it.",
    )
    backend: BackendName = Field(
        "exact",
        description="Arithmetic of packed linears. exact: dequantize the weight for each product; fast: for inputs of "
        "few rows, what is the fastest for each shape on this machine; dense: hold the dequantized weights; torch, "
        "ort, gemlite: for inputs of few rows, the kernels of that library.",
    )
    continuations: int = Field(
        3,
        ge=0,
        le=3,
        description="Prompts that both models continue, for the report: 40 tokens each, the most likely ones. 0: none.",
    )


# share of the predictions whose KL divergence is lower, by metric
PERCENTILES = {"median": 0.5, "99th percentile": 0.99, "99.9th percentile": 0.999, "maximum": 1.0}
AGREEMENT = "top-1 agreement"
# tasks of lm-eval that the shell completes; any other task of it is taken too
LM_EVAL_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "piqa", "winogrande")
# metrics of the tasks that qtool measures itself; every other task is lm-eval's
METRICS = {
    **dict.fromkeys(("wikitext2", "c4", "generated"), ("perplexity",)),
    "kl": ("kl", *PERCENTILES, AGREEMENT),
}


class ExpectedConfig(Section):
    """A published number, which the report shows beside the measured one."""

    tasks: tuple[str, ...] = Field(
        min_length=1, description="The task of the published number; of several tasks, it is the mean."
    )
    metric: str = Field(
        description="Metric as the report names it: perplexity, acc; acc_norm means acc for a task without acc_norm.",
    )
    value: float = Field(
        allow_inf_nan=False, description="The published number; an accuracy as a fraction, not in per cent: 0.6014."
    )
    source: str = Field(min_length=1, description="Publication of the number, e.g. arXiv 2406.06385, Table 4.")

    @model_validator(mode="after")
    def _one_of_ours(self) -> Self:
        for task in self.tasks:
            if self.metric not in METRICS.get(task, (self.metric,)):
                raise ValueError(f"{task} has no metric {self.metric!r}; it has {', '.join(METRICS[task])}")
        if self.metric.startswith("acc") and not 0 <= self.value <= 1:
            raise ValueError(f"accuracies are fractions: write {self.value / 100:.4g} for {self.value:g} %")
        return self


class ExportConfig(Section):
    """One export written after quantization."""

    format: str = Field(description="Name of the export format, e.g. dense.")
    path: OutputPath = Field(description="Folder to write; must not exist unless output.overwrite is set.")
    dtype: Dtype = Field(
        "auto",
        description="Dtype of the tensors that are stored in floating point. auto: the checkpoint's dtype, or a "
        "larger one where that would change a value.",
    )


class GgufConfig(Section):
    """The grids of a run whose result is for llama.cpp."""

    grid: Literal["keep", "k_m"] = Field(
        "keep",
        description="keep: the grids that section quant says. k_m: the mixture that llama.cpp makes around quant.grid "
        "(q2_k, q3_k, q4_k or q5_k), with more bits for the values of attention and the second linear of MLPs; methods "
        "round to it. quant.overrides, and a grid for quant.embedding, still count.",
    )


class OutputConfig(Section):
    """The folder of the checkpoint."""

    path: OutputPath = Field(description="Folder to write; it appears under this name only when complete.")
    overwrite: bool = Field(False, description="Replace an existing folder.")
    plots: bool = Field(False, description="Write the figures of report.html also as PNG and SVG files, in plots/.")


class TrackerConfig(Section):
    """The experiment tracker of a run; its name alone is short for ``{name: NAME}``."""

    name: Literal["none", "tensorboard", "wandb", "mlflow"] = Field(
        "none",
        description="Experiment tracker that gets the recipe, the figures of each block, the losses and learning rate "
        "of each step, and the final quality. tensorboard writes into OUT.logs. Its name alone, tracker: wandb, is "
        "short.",
    )
    project: str | None = Field(
        None,
        min_length=1,
        description="Project of Weights & Biases, or experiment of MLflow; unset: WANDB_PROJECT or "
        "MLFLOW_EXPERIMENT_NAME, else qtool.",
    )
    run_name: str | None = Field(
        None,
        pattern=r"^[^/\\]{1,100}$",
        description="Name of the run in the tracker, without slashes; unset: the name of the output folder.",
    )

    _name_alone = text_as("name")

    @model_validator(mode="after")
    def _keys_act(self) -> Self:
        if self.name == "none" and (idle := [key for key in ("project", "run_name") if getattr(self, key) is not None]):
            raise ValueError(f"{' and '.join(idle)} need a tracker; set name: tensorboard, wandb or mlflow")
        if self.name == "tensorboard" and self.project is not None:
            raise ValueError("TensorBoard has no projects; leave project out, or use wandb or mlflow")
        return self


# recipe keys that do not change a bit of the result
KEYS_WITHOUT_EFFECT = ("memory_budget", "save_every", "gradient_checkpointing")
