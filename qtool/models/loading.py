"""Loading a model from its folder, and refusing one that cannot be used.

The folder is checked before transformers reads it (``folders.py``), and the model afterwards: transformers fills
missing tensors with random numbers, drops tensors that it does not know, and accepts NaN. Code from a model's folder
never runs.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtool.config.sections import ModelConfig
from qtool.models import quantized_sources
from qtool.models.auto_class import auto_class, is_known
from qtool.models.experts import ExpertsLinear
from qtool.models.folders import ADAPTER, check_files, has_adapter, read_config, resolve, stored_tensor
from qtool.models.loaded import LoadedModel, Streaming, from_files, most_common
from qtool.models.tokenizer import load_tokenizer
from qtool.system import matmul, memory, progress
from qtool.system.errors import InputError, first_line
from qtool.system.tensors import dtype_name

WEIGHTS_PER_BYTE = 8  # most weights that a byte of a file can hold, at one bit each


def choose_device(name: str) -> torch.device:
    """Return the device that a recipe names; ``auto`` is the first GPU, or the CPU without one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"model.device: {name!r} is no device; use auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"model.device: {name} was asked for, but torch finds no GPU; use cpu or auto")
    count = 1 if device.type == "cpu" else torch.get_device_module(device).device_count() if offered(device) else 0
    if (device.index or 0) >= count:
        raise InputError(f"model.device: {name} was asked for, but torch offers no such device here; use cpu or auto")
    return device


def offered(device: torch.device) -> bool:
    """Return whether this machine has an accelerator of the type of ``device``, and torch can compute on it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == device.type


def load_model(
    config: ModelConfig, *, quantized: bool = False, streamed: bool = False, checked: LoadedModel | None = None
) -> LoadedModel:
    """Load a float model; with ``quantized``, load any model, for evaluation.

    A model that is published in FP8 or MXFP4, or as a GGUF file, is expanded first (``quantized_sources.py``), and its
    ``folder`` is that of the float model.

    With ``streamed`` its tensors stay in mapped files (``loaded.py``). ``checked`` is the same model as it was loaded
    before: its values are not checked again.

    Raises:
        InputError: the model is missing, damaged, pickled, incomplete or already quantized, has
            values that are not finite, needs code from its folder, or has an adapter beside it.
    """
    if config.free:
        raise InputError("model.free: only qtool ptq works without the model's class; leave it out of this recipe")
    device = choose_device(config.device)
    folder = resolve(config.path)
    check_adapter(config.path, folder)
    raw = read_config(folder)
    if not quantized:
        quantized_sources.refuse_quantized(config.path, raw)
    _check_code(config.path, raw)
    file_dtypes = check_files(folder)
    quantized_sources.refuse_codes(config.path, folder, raw)
    if not file_dtypes:
        raise InputError(f"{config.path} has no floating-point tensors; it is not a float model")
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_class(config.path, raw, model_config)
        tokenizer = load_tokenizer(config.path, folder)
        if quantized_sources.is_expandable(raw):
            folder = quantized_sources.expanded(config.path, folder, raw, config.dtype)
            file_dtypes = check_files(folder)
        storage = most_common(file_dtypes)
        dtype = compute_dtype(config.dtype, storage, device)
        matmul.choose_library(dtype)
        _check_size(model_config, folder)
        model, info = from_files(folder, storage if streamed else dtype, streamed=streamed)
    except InputError:
        raise
    except Exception as error:  # transformers raises errors of many kinds for a folder that it cannot load
        raise InputError(f"{config.path} cannot be loaded: {first_line(error).rstrip(':'):.300}") from error
    if info["unexpected_keys"] and type(model.config) is not type(model_config):
        raise InputError(
            f"{config.path} is a model of which transformers loads its decoder only, so that "
            f"{len(info['unexpected_keys'])} tensor(s) would be lost; such models are not supported"
        )
    _check_complete(config.path, info)
    if checked is not None and _holds(dtype, checked.extremes):
        extremes = checked.extremes
    else:
        narrow = any(torch.finfo(stored).max > torch.finfo(dtype).max for stored in file_dtypes.values())
        extremes = {} if quantized and not narrow else _check_finite(model, folder, dtype)
    model.eval().requires_grad_(False)
    streaming = Streaming(dtype, device) if streamed else None
    return LoadedModel(
        model if streamed else model.to(device), tokenizer, config.path, folder, file_dtypes, streaming, extremes
    )


def _check_code(path: str, raw: dict[str, Any]) -> None:
    """Refuse a model type that transformers does not know: it would need code from the model's folder.

    ``auto_map`` names such code. Many models keep it although transformers has their classes by now; it is ignored
    then.
    """
    kind = raw.get("model_type")
    if "auto_map" in raw and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise InputError(
            f"{path} has the model type {kind!r}, which transformers {transformers.__version__} does not know; it "
            "needs code from its own folder (auto_map), and qtool never runs such code; use a newer transformers, a "
            "model of a type that transformers knows, or model.free: true with method rtn or hqq"
        )


def _check_class(path: str, raw: dict[str, Any], config: PreTrainedConfig) -> None:
    """Refuse a model whose folder names code for a class that transformers itself does not have."""
    if "auto_map" in raw and not is_known(config):
        raise InputError(
            f"{path} has the model type {raw.get('model_type')!r}, of which transformers has no causal language model; "
            "the class that auto_map in config.json names is code of its own folder, and qtool never runs such code"
        )


def check_adapter(path: str, folder: Path) -> None:
    """Refuse a model with a LoRA adapter: transformers adds it if peft is installed, and leaves it out if not.

    Of a folder with an adapter alone, ``read_config`` says so.
    """
    if has_adapter(folder) and (folder / "config.json").exists():
        raise InputError(
            f"{path} holds an adapter ({ADAPTER}) that is not merged into the model; merge it first, with "
            "peft: PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(new_folder); or, to "
            "quantize the model without it, move the files adapter_* elsewhere"
        )


def _check_size(config: Any, folder: Path) -> None:
    """Refuse a config that asks for far more weights than the files hold: transformers would make them at random."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        num_weights = sum(
            parameter.numel()
            for parameter in auto_class(config).from_config(config, trust_remote_code=False).parameters()
        )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if num_weights > size * WEIGHTS_PER_BYTE:
        raise InputError(
            f"{folder / 'config.json'} asks for {num_weights:.3g} weights, and the files hold {size:,} bytes; the "
            "config is of another model, or files are missing"
        )


def _holds(dtype: torch.dtype, extremes: dict[str, tuple[float, float]]) -> bool:
    """Return whether values between these extremes stay finite in ``dtype``."""
    return all(max(-low, high) <= torch.finfo(dtype).max for low, high in extremes.values())


def _check_finite(model: nn.Module, folder: Path, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Return the lowest and the highest value of each parameter; refuse values that are not finite in ``dtype``."""
    pages, extremes = memory.Pages(), {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        weights = module.expert_weights() if isinstance(module, ExpertsLinear) else [parameter.detach()]
        ends = torch.tensor([[float(end) for end in weight.aminmax()] for weight in weights])
        low, high = float(ends[:, 0].min()), float(ends[:, 1].max())  # NaN passes through
        pages.drop(parameter)
        extremes[name] = low, high
        largest = max(-low, high)
        if not (math.isfinite(low) and math.isfinite(high)):
            stored = stored_tensor(folder, name)
            if stored is None or not stored.isfinite().all():
                weights = module.expert_weights() if isinstance(module, ExpertsLinear) else [parameter]
                found = sum(int((~torch.isfinite(weight)).sum()) for weight in weights)
                raise InputError(
                    f"{name} holds {found} NaN or infinite value(s) of {parameter.numel()}; repair the checkpoint"
                )
            largest = float(stored.abs().max())
        if largest > torch.finfo(dtype).max:
            raise InputError(
                f"{name} has values of up to {largest:.6g}, and {dtype_name(dtype)}, in which the model would compute, "
                f"holds none above {torch.finfo(dtype).max:g}; set model.dtype to bfloat16 or float32"
            )
    return extremes


def compute_dtype(name: str, storage: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype called ``name``; ``auto``: ``storage`` if the device multiplies it natively, or else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cpu":
        return storage
    able = torch.cpu.get_capabilities()
    native = storage == torch.bfloat16 and (able.get("avx512_bf16") or able.get("amx_bf16"))
    return storage if native else torch.float32


def _check_complete(path: str, info: dict[str, Any]) -> None:
    """Refuse a model that lacks tensors or has some of another shape; a note names tensors that are not used."""
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise InputError(
            f"{path}: {name} has shape {list(found)} in the file, and the config asks for {list(expected)}"
        )
    adapter = sorted(name for name in info["unexpected_keys"] if ".lora_" in name or ".base_layer." in name)
    if adapter:
        raise InputError(
            f"{path}: its files hold an adapter that is not merged into the model ({len(adapter)} tensor(s), the first "
            f"is {adapter[0]}); merge it first, with peft: merge_and_unload().save_pretrained(new_folder)"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"{path} lacks {len(missing)} tensor(s) that its config asks for, the first is {missing[0]}")
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        progress.note(f"{path}: {len(unused)} tensor(s) in the files are not used by its config, e.g. {unused[0]}")
