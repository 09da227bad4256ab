"""Quantizing a model in memory, for notebooks: what is refused before the model changes, and the job of its method."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtool.allocation import k_mixture
from qtool.blocks.job import Job, Result, load_method
from qtool.blocks.tables import pack_embeddings
from qtool.checkpoints.native import as_listed
from qtool.checkpoints.quantization_config import section_of
from qtool.checkpoints.transformers_hook import QtoolConfig, QtoolQuantizer
from qtool.config.recipe import Recipe
from qtool.data import windows
from qtool.data.generated import check_length
from qtool.evaluation.weights import errors_against
from qtool.models.loaded import LoadedModel
from qtool.pipelines import scale_dtype
from qtool.system.errors import InputError


def in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, key: str = "model") -> LoadedModel:
    """Return a model that was loaded elsewhere as qtool's own functions take it; ``key`` is the argument to blame.

    Raises:
        InputError: it is not a causal language model of transformers, or its weights are not in memory.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{key}: found {kind}; give a model that AutoModelForCausalLM.from_pretrained returned")
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise InputError(f"{key}: {kind} is not a causal language model; load it with AutoModelForCausalLM")
    tensors = model.state_dict()
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        raise InputError(f"{key}: its weights are on the device meta, so not in memory; load it without offloading")
    floats = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    # None where no text is read
    return LoadedModel(model, cast("PreTrainedTokenizerBase", tokenizer), kind, Path(), floats)


def check_tokens(key: str, tokens: Tensor, loaded: LoadedModel) -> None:
    """Refuse tokens that are not windows for this model.

    Raises:
        InputError: they are not ``[n, t]`` integers with ``n >= 1`` and ``t >= 2``, are longer than the model's
            context, or are not in its vocabulary.
    """
    expected = "expected windows of tokens: an integer tensor [n, t], n at least 1, t at least 2"
    if not isinstance(tokens, Tensor):
        raise InputError(f"{key}: found {type(tokens).__name__}; {expected}")
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.dim() != 2 or len(tokens) < 1 or tokens.shape[1] < 2:
        raise InputError(f"{key}: found a tensor {list(tokens.shape)} of {tokens.dtype}; {expected}")
    check_length(f"the number of tokens in a window of {key}", tokens.shape[1], loaded)
    vocabulary = loaded.num_embeddings
    lowest, highest = (int(end) for end in tokens.aminmax())
    if lowest < 0 or highest >= vocabulary:
        raise InputError(
            f"{key}: found tokens from {lowest} to {highest}, and the vocabulary of {loaded.path} has the tokens 0 to "
            f"{vocabulary - 1}; tokenize with the tokenizer of this model"
        )


def check_vocabularies(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Refuse a reference with another vocabulary: its predictions are not about the same tokens."""
    ours, theirs = (each.config.get_text_config().vocab_size for each in (model, reference))
    if ours != theirs:
        raise InputError(
            f"reference: its vocabulary has {theirs} tokens, and that of the model {ours}; compare with the float "
            "model that it was made from"
        )


def quantize(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe, tokens: Tensor | None
) -> Result:
    """Quantize ``model`` in place by the sections ``method``, ``quant`` and ``data`` of ``recipe``.

    ``tokens``, if given, are the calibration text. Afterwards the model is in evaluation mode, no parameter needs a
    gradient, and ``save_pretrained`` writes a native checkpoint.

    Raises:
        InputError: the model, the tokens or a section cannot be used; the model is as it was.
        RunError: the method failed; the model may be quantized in part.
    """
    loaded = in_memory(model, tokenizer)
    _check_float(model)
    if recipe.quant.budget is not None:
        raise InputError(
            "quant.budget: a model in memory is quantized with given widths, not by a budget; give the widths in "
            "quant.overrides, or run a recipe with qtool.quantize"
        )
    if tokens is not None:
        check_tokens("data", tokens, loaded)
    training = [module for module in model.modules() if module.training]
    try:
        job = _job(loaded, recipe, tokens)
    except BaseException:
        for module in training:
            module.training = True
        raise
    model.requires_grad_(False)
    job = pack_embeddings(job)
    result: Result = load_method(recipe.method.name).run(job, recipe.method)
    result = result._replace(weight_errors={**job.tables.errors, **result.weight_errors})
    specs = {target.name: target.spec for target in job.targets} | job.tables.specs
    config = QtoolConfig(**section_of(specs, as_listed(job.tables)))
    whole: Any = model  # Any: transformers sets both without declaring them
    whole.config.quantization_config, whole.hf_quantizer = config, QtoolQuantizer(config)
    if loaded.pristine is not None:
        result = result._replace(weight_errors=errors_against(model, loaded.pristine))
    return result


def _job(loaded: LoadedModel, recipe: Recipe, tokens: Tensor | None) -> Job:
    """Return the job of a recipe on a model in memory; ``tokens``, if given, are the calibration text."""
    method = load_method(recipe.method.name)
    loaded.model.eval()
    recipe = scale_dtype.chosen(recipe, loaded.storage_dtype)
    job = Job.select(loaded, k_mixture.quant_of(recipe, loaded), seed=recipe.seed)
    text: tuple[Tensor | None, Tensor | None] = (tokens, None)
    if not method.needs_data(recipe.method):
        text = (None, None)
    elif tokens is None:
        if not isinstance(loaded.tokenizer, PreTrainedTokenizerBase):
            raise InputError(
                f"tokenizer: found {type(loaded.tokenizer).__name__}, and {recipe.method.name} needs one for its "
                "calibration text; give the model's tokenizer, or tokens as data"
            )
        text = windows.calibration(recipe.data, loaded, recipe.seed)[:2]
    if method.end_to_end(recipe.method):
        loaded.pristine = copy.deepcopy(loaded.model)
    return replace(job, tokens=text[0], labels=text[1])


def _check_float(model: nn.Module) -> None:
    """Refuse a model some of whose linears were replaced before, by a finished or an interrupted call."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("qtool."):
            raise InputError(
                f"model: {name} is a {type(module).__name__} already, so this model was quantized before, wholly or in "
                "part; load the float model again, and quantize all of its linears in one call"
            )
