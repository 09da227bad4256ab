"""Models whose blocks differ, and methods that pack a block in stages or at once."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Auto
from transformers import FalconConfig, Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from helpers import tiny
from qtool.blocks.driver import run_blocks
from qtool.blocks.hidden_states import HiddenStates
from qtool.blocks.job import Job
from qtool.blocks.stages import Stage, stages
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantConfig
from qtool.methods import rtn
from qtool.models.linears import Target
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight

W2 = QuantConfig(num_bits=2, group_size=16)  # coarse, so that what came before shows in every input
SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
GATED = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
WINDOWS: dict[str, Any] = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GATED),
    "gemma3": lambda: Gemma3TextConfig(**GATED, **WINDOWS),  # masks and rotary tables differ between blocks
    "falcon": lambda: FalconConfig(**SIZES, multi_query=True, parallel_attn=True),  # one input for two branches
    "falcon_alibi": lambda: FalconConfig(**SIZES, alibi=True, multi_query=False, parallel_attn=False),
}


def make(name: str) -> LoadedModel:
    torch.manual_seed(0)
    model = Auto.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    return LoadedModel(model, tiny.tokenizer(), name, Path(), {})


def nearest(target: Target) -> QuantizedWeight:
    return rtn.round_to_nearest(target.weight, target.spec, rtn.Config())


def pack_all(task: BlockTask) -> None:
    for target in task.targets:
        task.pack(target, nearest(target))


def pack_in_stages(task: BlockTask) -> None:
    for stage in stages(task):
        for target in stage.targets:
            task.pack(target, nearest(target))


def run_copy(block: nn.Module, task: BlockTask, watched: nn.Module | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of ``block`` on the inputs of ``task``, and the inputs of ``watched`` meanwhile."""
    seen: list[Tensor] = []
    hook = watched.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2))) if watched else None
    outputs = [replace(task, block=block).forward(hidden) for hidden in task.inputs]
    if hook is not None:
        hook.remove()
    return outputs, seen


def local(task: BlockTask, target: Target) -> str:
    return target.name.removeprefix(f"{task.name}.")


def float_states(loaded: LoadedModel, tokens: Tensor) -> list[tuple[BlockTask, Stage | None, list[Tensor]]]:
    """Return every stage with its expected float inputs; then ``None`` with the float outputs of the block."""
    pristine = copy.deepcopy(loaded)
    results: list[tuple[BlockTask, Stage | None, list[Tensor]]] = []
    hidden: list[Tensor] = []

    def quantize_block(task: BlockTask) -> None:
        block = pristine.blocks()[task.index][1]
        if task.index == 0:
            hidden.extend(task.inputs)
        floats = replace(task, inputs=HiddenStates(None, hidden))
        for stage in stages(task):
            outputs, seen = run_copy(block, floats, block.get_submodule(local(task, stage.targets[0])))
            copied = Stage(stage.targets, list(stage.inputs), stage.float_inputs and list(stage.float_inputs))
            results.append((task, copied, seen))
            for target in stage.targets:
                task.pack(target, nearest(target))
        results.append((task, None, outputs))
        hidden[:] = outputs

    run_blocks(Job.select(loaded, W2, tokens), quantize_block, with_float_states=True)
    return results


def untouched(loaded: LoadedModel) -> bool:
    return not any("forward" in vars(module) for module in loaded.model.modules())
