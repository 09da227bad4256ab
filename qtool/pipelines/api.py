"""The public Python API: what ``import qtool`` offers, loaded when it is first used.

Every function takes and gives plain things: a recipe's name, a dict, a path, a transformers model, a tensor of tokens;
reports and results are the same objects that the command line prints.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtool.allocation.plan import BitPlan
from qtool.blocks.job import Result
from qtool.config import catalog, files
from qtool.config.keywords import merged, section, start_of, with_folder
from qtool.config.overrides import changed
from qtool.config.recipe import EvalRecipe, Recipe, check, check_export, resolved, with_plan, written
from qtool.config.sections import AGREEMENT
from qtool.config.sweep import BenchConfig
from qtool.evaluation import bench as speed
from qtool.evaluation import perplexity as scores
from qtool.models import backend
from qtool.models.backend import Backends
from qtool.pipelines import evaluate as evaluation
from qtool.pipelines import export as exporting
from qtool.pipelines import in_memory as pipeline_in_memory
from qtool.pipelines import plan as planning
from qtool.pipelines import quantize as pipeline
from qtool.pipelines.in_memory import check_tokens, check_vocabularies, in_memory
from qtool.pipelines.outcome import Outcome
from qtool.reports import compared_paths
from qtool.reports.bench_report import BenchReport
from qtool.reports.comparison import Comparison
from qtool.reports.records import Metric
from qtool.reports.report import Report
from qtool.system.errors import InputError
from qtool.system.paths import expand

Keys = Mapping[str, object]


class Divergence(NamedTuple):
    """The divergence of a model from a reference, over the same predictions."""

    kl: Metric  # mean KL(reference || model), in nats per token
    agreement: Metric  # share of tokens whose most likely successor is the same in both
    percentiles: dict[str, Metric]  # over predictions: median, 99th percentile, 99.9th percentile, maximum


def load_recipe(recipe: str | Path | Keys | Recipe, **changes: object) -> Recipe:
    """Check a recipe: a YAML file, the name of a packaged one, a dict of sections, or a recipe to change.

    ``changes`` are values by dotted key, as ``--set`` takes them: ``seed=1, **{"quant.num_bits": 3}``.

    Raises:
        InputError: with every fault on a line of its own: dotted key, what is wrong, and the value found.
    """
    if isinstance(recipe, Recipe):
        raw = resolved(recipe)
    else:
        raw = files.read_yaml(recipe) if isinstance(recipe, str | Path) else section("recipe", recipe, "a name or path")
    wrong = []
    for key, value in changes.items():
        try:
            raw = changed(raw, key, value)
        except ValueError as error:
            wrong.append(f"{key}: {error}")
    name = recipe if isinstance(recipe, str | Path) else "the recipe"
    source = f"{name} with changes" if changes else name
    if isinstance(recipe, Recipe):  # which has every key
        return check(Recipe, with_plan(raw), source, wrong)
    return written(raw, source, wrong)


def recipes() -> tuple[str, ...]:
    """Return the names of the packaged recipes, e.g. ``quickstart``."""
    return tuple(files.packaged())


def methods() -> tuple[str, ...]:
    """Return the names of the quantization methods, the values of ``method.name``."""
    return catalog.methods()


def formats() -> tuple[str, ...]:
    """Return the names of the export formats."""
    return catalog.export_formats()


def quantize(
    source: str | Path | Keys | Recipe,
    *,
    method: str | Keys | None = None,
    num_bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    data: str | Path | Keys | None = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    tasks: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    fresh: bool = False,
    **changes: object,
) -> Outcome | None:
    """Quantize a model, or run a recipe, as ``qtool quantize`` does: quantize, save, evaluate and export.

    A run that was stopped continues when the same call is repeated. Of several processes that ``torchrun`` started, the
    first gets the outcome and the others ``None``.

    Args:
        source: a model (a folder, a hub name, ``builtin:wiki-llama-3m``, a GGUF file), or a recipe as in
            :func:`load_recipe`. Arguments that are left out have the recipe's values; of a model alone they are
            ``gptq``, 4 bits, groups of 64, and no evaluation.
        method: the name of a method, or its section: ``{"name": "gptq", "damp": 0.1}``.
        num_bits: bits per weight, ``quant.num_bits``.
        group_size: input channels that share a scale, ``quant.group_size``; -1: one group per row.
        symmetric: hold the zero point at the middle of the grid, ``quant.symmetric``.
        data: calibration text: a source or a file, ``data.source``, or the section ``data``.
        num_samples: windows of calibration text, ``data.num_samples``.
        seq_len: tokens in a window, ``data.seq_len``.
        tasks: what to measure afterwards, ``eval.tasks``: ``"kl"``, ``["wikitext2", "boolq"]``.
        output: the folder to write, ``output.path``; of a model alone ``out/MODEL-METHOD-GRID``.
        fresh: delete what an unfinished run left, and start over.
        changes: other keys of the recipe by dotted key: ``seed=1, **{"output.overwrite": True}``.

    Raises:
        InputError: anything in the recipe, the model or the data that cannot be used; nothing was written.
        RunError: the run could not be finished; what is done stays.
    """
    if isinstance(source, PreTrainedModel):
        raise InputError("source: found a model in memory; give its folder or hub name, or call qtool.quantize_model")
    arguments = {
        "method.name": method,
        "quant.num_bits": num_bits,
        "quant.group_size": group_size,
        "quant.symmetric": symmetric,
        "data.source": str(data) if isinstance(data, Path) else data,
        "data.num_samples": num_samples,
        "data.seq_len": seq_len,
        "eval.tasks": (tasks,) if isinstance(tasks, str) else tasks,
        "output.path": output,
    }
    changes = merged(arguments, changes)
    if not isinstance(source, str | Path) or files.is_recipe(source, "source"):
        return pipeline.quantize(load_recipe(source, **changes), fresh)
    checked = load_recipe(start_of(str(source), changes), **changes)
    return pipeline.quantize(checked if {"output", "output.path"} & changes.keys() else with_folder(checked), fresh)


def quantize_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    method: str | Keys = "gptq",
    *,
    num_bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    quant: Keys | None = None,
    data: str | Keys | Tensor = "generated",
    num_samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
) -> Result:
    """Quantize a model in memory and in place: its linears become ``PackedLinear``, and nothing is written.

    ``model.save_pretrained(folder)`` and ``tokenizer.save_pretrained(folder)`` then write a native checkpoint, which
    :func:`export` takes. Afterwards the model is in evaluation mode, and none of its parameters needs a gradient. A
    call that failed or was interrupted after it had begun leaves the model quantized in part: load it again.

    Args:
        model: a causal language model of transformers, float, on the device where it is to be quantized.
        tokenizer: its tokenizer, for calibration text; ``None`` where ``data`` has tokens or the method needs no text.
        method: the name of a method, or its section: ``{"name": "gptq", "damp": 0.1}``.
        num_bits: bits per weight: 2, 3, 4 or 8.
        group_size: input channels that share a scale; -1: one group per row.
        symmetric: hold the zero point at the middle of the grid.
        quant: other keys of the section ``quant``, such as ``overrides``; no ``budget``.
        data: calibration text: a source as in the recipe's ``data.source``, its section, or tokens ``[n, t]`` int64.
        num_samples: windows of text.
        seq_len: tokens in a window.
        seed: fixes everything random.

    Returns:
        What the method recorded, and the relative error of each weight.

    Raises:
        InputError: keys, a model or text that cannot be used; the model is as it was.
        RunError: the method failed; the model may be quantized in part.
    """
    windows_of = {} if isinstance(data, Tensor) else section("data", data, "source")
    if not isinstance(data, Tensor):
        windows_of = {"num_samples": num_samples, "seq_len": seq_len, **windows_of}
    sections: dict[str, object] = {
        "model": {"path": "the model"},
        "method": section("method", method, "name"),
        "quant": {"num_bits": num_bits, "group_size": group_size, "symmetric": symmetric}
        | section("quant", quant or {}),
        "data": windows_of,
        "output": {"path": "memory"},  # nothing is written
        "seed": seed,
    }
    checked = check(Recipe, with_plan(sections), "qtool.quantize_model")
    return pipeline_in_memory.quantize(model, tokenizer, checked, data if isinstance(data, Tensor) else None)


def evaluate(
    model: str | Path | PreTrainedModel,
    tasks: str | Sequence[str] = ("wikitext2", "kl"),
    *,
    reference: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    **keys: object,
) -> Report:
    """Measure a model as ``qtool eval`` does; the report shows itself in a notebook.

    Args:
        model: a native, exported or plain folder, a hub name, or a model in memory with its ``tokenizer``.
        tasks: ``wikitext2``, ``c4`` and ``generated`` (token perplexity), ``kl``, or any task of lm-eval.
        reference: the float model to compare with; left out: the one that a checkpoint was made from.
        tokenizer: the tokenizer of a model in memory; a folder has its own.
        output: folder for ``report.json``, ``report.md`` and ``report.html``.
        seed: fixes the text of ``generated``.
        dtype: precision of computation of models that are loaded from folders.
        device: where models that are loaded from folders compute.
        keys: other keys of the recipe's section ``eval``: ``limit``, ``num_fewshot``, ``batch_size``, ``context``,
            ``backend``.

    Raises:
        InputError: a task, a model or a folder cannot be used, or the arguments do not fit each other.
    """
    path = str(model) if isinstance(model, str | Path) else "the model"
    where = None if output is None else expand(output, "output")
    asked = {
        "model": {"path": path, "dtype": dtype, "device": device},
        "eval": {"tasks": (tasks,) if isinstance(tasks, str) else tuple(tasks), **keys},
        "seed": seed,
    }
    checked = check(EvalRecipe, asked, "qtool.evaluate")
    if isinstance(model, str | Path):
        if isinstance(reference, PreTrainedModel):
            raise InputError("reference: found a model in memory, but the model is in a folder; give a folder as well")
        if tokenizer is not None:
            raise InputError("tokenizer: the model is in a folder, whose own tokenizer is used; leave tokenizer out")
        return evaluation.evaluate(
            checked.model,
            checked.eval,
            float_model=None if reference is None else str(reference),
            output=where,
            seed=seed,
        ).report
    if isinstance(reference, str | Path):
        raise InputError(
            "reference: found a folder, but the model is in memory; load the reference and give that model"
        )
    return evaluation.evaluate_in_memory(model, reference, tokenizer, checked, where)


def perplexity(model: PreTrainedModel, tokens: Tensor, *, batch_size: int | Literal["auto"] = "auto") -> Metric:
    """Measure token perplexity on windows ``tokens`` ``[n, t]`` int64: exp of the mean negative log-likelihood.

    Each window gives ``t - 1`` predictions; the standard error is over windows, by the delta method.

    Raises:
        InputError: not a causal language model, or not windows of its tokens.
    """
    check_tokens("tokens", tokens, in_memory(model, None))
    return scores.perplexity(model, tokens, batch_size)


def kl(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokens: Tensor,
    *,
    batch_size: int | Literal["auto"] = "auto",
) -> Divergence:
    """Measure KL(reference || model) on windows ``tokens`` ``[n, t]`` int64: mean, percentiles, top-1 agreement.

    The divergence is the mean over ``n (t - 1)`` predictions, in nats per token.

    Raises:
        InputError: one is not a causal language model, or the tokens are not windows for both.
    """
    check_tokens("tokens", tokens, in_memory(model, None))
    check_tokens("tokens", tokens, in_memory(reference, None, "reference"))
    check_vocabularies(model, reference)
    found = scores.divergence(model, reference, tokens, batch_size)
    return Divergence(found.pop("kl"), found.pop(AGREEMENT), found)


def export(
    folder: str | Path, format: str, output: str | Path, *, dtype: str = "auto", overwrite: bool = False
) -> Path:
    """Write the native checkpoint in ``folder`` for another engine; return the folder of the export.

    The export is read back and compared before it gets its name. ``dtype`` is that of the tensors which stay float;
    ``auto`` is the checkpoint's own, or float32 where that does not hold the weights exactly. ``overwrite`` replaces an
    existing folder.

    Raises:
        InputError: not a native checkpoint, or one that the format cannot hold exactly; the message says why.
        RunError: what was read back differs; nothing was kept.
    """
    entry = check_export({"format": format, "path": output, "dtype": dtype}, "qtool.export")
    return exporting.export(expand(folder, "folder"), entry, overwrite)


def plan(recipe: str | Path | Keys | Recipe, **changes: object) -> BitPlan:
    """Return the bit widths that the budget of a recipe comes to; nothing is written.

    Raises:
        InputError: the recipe has no budget, or one that cannot be met.
    """
    return planning.plan(load_recipe(recipe, **changes))


def bench(folder: str | Path, *, dtype: str = "bfloat16", device: str = "auto", **keys: object) -> BenchReport:
    """Measure speed, memory and energy of a checkpoint beside the same weights held densely.

    ``dtype`` is the precision of computation and ``device`` where it takes place (``auto``: the first GPU, or the CPU).
    ``keys`` are ``prompt_tokens`` (256), ``new_tokens`` (32) and ``repeats`` (5).

    Raises:
        InputError: no checkpoint of qtool, or a prompt that its context does not hold.
    """
    options = check(BenchConfig, {"dtype": dtype, **keys}, "qtool.bench")
    return speed.bench(str(folder), device, options)


def compare(runs: str | Path | Sequence[str | Path]) -> Comparison:
    """Return runs side by side, from the ``report.json`` in their folders, and which are best for their size.

    What holds no report is left out; ``left_out`` names it.

    Raises:
        InputError: a path that does not exist, a damaged report, or no report at all.
    """
    return compared_paths.compare([expand(run, "runs") for run in ([runs] if isinstance(runs, str | Path) else runs)])


def use_backend(model: nn.Module, name: str = "fast") -> Backends:
    """Let a loaded model decode with this machine's kernels, or exactly again (``exact``).

    ``fast`` times what there is for each shape of the model, and takes the fastest; ``dense``, ``torch``, ``ort`` and
    ``gemlite`` use the kernels of that library. Returns which kernels serve which linears; a linear without a kernel
    stays exact, and a warning says so.

    Raises:
        InputError: ``name`` is unknown, or ``model`` has no packed linears or weights that are not in memory.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: found {type(model).__name__}; give a loaded model")
    found = backend.use_backend(model, name)
    if name != "exact" and found.exact:
        warnings.warn(f"qtool.use_backend: {found}", stacklevel=2)
    return found
