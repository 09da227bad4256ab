"""The hidden states that the block driver feeds each block are the model's own, for every batch, whatever it shares."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import architectures, tiny
from helpers.families import CONFIGS, GATED, make_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qtool.blocks import driver, states
from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantConfig
from qtool.data.generated import generated_tokens
from qtool.methods import awq, gptq, rtn, signround, smoothquant
from qtool.methods.efficientqat import block_ap
from qtool.methods.efficientqat.config import BlockConfig
from qtool.models import experts
from qtool.models.loaded import LoadedModel
from qtool.system.errors import InputError
from qtool.training.block_loss import BlockLoss
from qtool.training.block_training import BlockTraining

LAYERS = {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 8}
LOCAL_AND_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
PER_LAYER = {"vocab_size_per_layer_input": tiny.VOCABULARY, "hidden_size_per_layer_input": 16}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    # inputs of each layer made from the tokens; the last two layers read the keys and values of the first two
    "gemma4": ("Gemma4TextConfig", GATED | LAYERS | LOCAL_AND_GLOBAL | PER_LAYER | {"num_kv_shared_layers": 2}),
    # the same, and several versions of the hidden states, which come before the windows
    "gemma3n": (
        "Gemma3nTextConfig",
        GATED
        | LAYERS
        | LOCAL_AND_GLOBAL
        | PER_LAYER
        | {
            "num_kv_shared_layers": 2,
            "laurel_rank": 16,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "lfm2": ("Lfm2Config", GATED | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96}),
    "qwen3_5": ("Qwen3_5TextConfig", GATED | {"head_dim": 16} | DELTA),
    "openai-gpt": ("OpenAIGPTConfig", {"vocab_size": tiny.VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}),
}
SHARING = ["gemma4", "gemma3n"]
PASSING = ["glm_moe_dsa", "zaya"]  # blocks return what the next block reads: chosen tokens, states of the router
W2 = QuantConfig(num_bits=2, group_size=-1)
QUICK = BlockConfig(name="efficientqat", min_steps=2, epochs=0.1)
TOKENS = torch.randint(1, tiny.VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two windows; of five windows the last is alone."""
    monkeypatch.setattr(states, "TOKENS_PER_BATCH", 48)


def make(name: str) -> LoadedModel:
    config: PreTrainedConfig = make_config(name) if name in CONFIGS else _other(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    experts.unfuse(model)
    dtypes = {key: torch.float32 for key, _ in model.named_parameters()}
    return LoadedModel(model, tiny.tokenizer(), name, Path(), dtypes)


def _other(name: str) -> PreTrainedConfig:
    if name in PASSING:
        return architectures.make_config(name)
    kind, values = OTHERS[name]
    config: PreTrainedConfig = getattr(transformers, kind)(**values)
    return config


@torch.no_grad()
def own_inputs(model: PreTrainedModel, blocks: list[tuple[str, nn.Module]]) -> list[list[Tensor]]:
    """Return what enters each block in the model's own forward, for each batch; windows come first."""
    seen: list[list[Tensor]] = [[] for _ in blocks]

    def record(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[index].append((hidden.movedim(1, 0) if hidden.dim() == 4 else hidden).clone())

        return hook

    hooks = [b.register_forward_pre_hook(record(i), with_kwargs=True) for i, (_, b) in enumerate(blocks)]
    for batch in TOKENS.split(2):
        model(input_ids=batch, use_cache=False)
    for each in hooks:
        each.remove()
    return seen


def equal(found: list[list[Tensor]], expected: list[list[Tensor]]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)
    )


def plain(states: Any) -> list[Tensor]:
    return [hidden.as_subclass(Tensor).clone() for hidden in states]


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS, *PASSING])
def test_every_batch_gets_the_hidden_states_of_the_models_own_forward(name: str) -> None:
    loaded = make(name)
    expected = own_inputs(loaded.model, loaded.blocks())
    assert equal([plain(task.inputs) for task in driver.walk(Job(loaded, (), TOKENS))], expected)
    assert not torch.equal(expected[-1][0], expected[-1][1]), "the batches are the same; the test says nothing"


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", [*SHARING, *PASSING])
def test_the_quantized_and_the_float_stream_have_what_their_own_blocks_share(
    name: str, on_disk: bool, tmp_path: Path
) -> None:
    """Keys and values that later blocks read come from the quantized blocks in the one, and the float in the other."""
    loaded, floats = make(name), make(name)
    expected_floats = own_inputs(floats.model, floats.blocks())
    found: list[list[Tensor]] = []
    found_floats: list[list[Tensor]] = []

    def quantize_block(task: BlockTask) -> None:
        assert task.float_inputs is not None
        found.append(plain(task.inputs))
        found_floats.append(plain(task.float_inputs))
        task.pass_floats()
        for target in task.targets:
            task.pack(target, rtn.round_to_nearest(target.weight, target.spec, rtn.Config()))

    job = Job.select(loaded, W2, TOKENS)
    if on_disk:
        workspace = tiny.Kept(tmp_path)
        workspace.memory_budget = 0
        job = Job(loaded, job.targets, TOKENS, workspace=workspace)
    run_blocks(job, quantize_block, with_float_states=True)
    if not on_disk:  # else the blocks were freed
        assert equal(found, own_inputs(loaded.model, loaded.blocks()))
        assert not torch.equal(found[-1][0], found_floats[-1][0])
    else:
        other = make(name)
        rtn.run(Job.select(other, W2), rtn.Config())
        assert equal(found, own_inputs(other.model, other.blocks()))
    assert equal(found_floats, expected_floats)


@pytest.mark.parametrize("name", SHARING)
def test_methods_see_the_windows_they_ask_for(name: str) -> None:
    """Methods that cut, mix and pause batches give each window what belongs to it: a float block has no error."""
    loaded = make(name)
    losses: list[float] = []

    def visit(task: BlockTask) -> None:
        task.pass_floats()
        assert task.float_outputs is not None
        training = BlockTraining(task, BlockLoss(task.float_outputs), [], [])
        losses.append(max(float(training.part_loss(part)) for part in ([3, 1], [4], [0, 2])))
        for target in task.targets:
            task.pack(target, rtn.round_to_nearest(target.weight, target.spec, rtn.Config()))

    run_blocks(Job.select(loaded, W2, TOKENS), visit, with_float_states=True)
    assert losses[0] == pytest.approx(0, abs=1e-6)  # later blocks read inputs of quantized blocks
    assert min(losses[1:]) > 1e-3


METHODS: dict[str, Callable[[Job], object]] = {
    "gptq": lambda job: gptq.run(job, gptq.Config()),
    "gptaq": lambda job: gptq.run(job, gptq.Config(gptaq=0.5)),  # float forwards pause beside the quantized ones
    "awq": lambda job: awq.run(job, awq.Config()),
    "smoothquant": lambda job: smoothquant.run(job, smoothquant.Config(weights="gptq")),
    "signround": lambda job: signround.run(job, signround.Config(iterations=2)),
    "block_ap": lambda job: run_blocks(
        job,
        lambda task: block_ap.quantize_block(task, job.loaded, QUICK, None, 0),
        with_float_states=True,
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHARING)
def test_every_kind_of_method_runs_and_the_model_says_the_same_afterwards(name: str, method: str) -> None:
    loaded = make(name)
    before = tiny.logits(loaded.model)
    METHODS[method](Job.select(loaded, QuantConfig(num_bits=8, group_size=-1), TOKENS))
    assert float((tiny.logits(loaded.model) - before).norm() / before.norm()) < 0.2


def test_the_model_writes_text_where_layers_have_heads_of_different_sizes() -> None:
    loaded = make("gemma4")
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = loaded.model.config.head_dim
    tokens = generated_tokens(loaded, 3, 16, 0)
    assert tokens.shape == (3, 16)


# ------------------------------------------------------------------------- what the driver cannot do, in one clear line


class Odd(nn.Module):
    """Stands for a block of an architecture that calls or feeds its blocks in a way of its own."""

    def __init__(self, block: nn.Module, change: Callable[[Tensor, dict[str, Any]], Any]) -> None:
        super().__init__()
        self.block, self.change = block, change

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.change(hidden_states, kwargs)
        out = self.block(hidden_states, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


def refused(loaded: LoadedModel, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        list(driver.walk(Job(loaded, (), TOKENS)))
    assert "use rtn or hqq" in str(error.value)
    assert "\n" not in str(error.value)
    assert not any("forward" in vars(module) for module in loaded.model.modules())


def test_blocks_that_are_not_called_are_refused() -> None:
    loaded = make("llama")
    loaded.model.config.num_hidden_layers = 1
    refused(loaded, "it calls 1 of its 2 blocks")


def test_blocks_that_are_called_again_are_refused() -> None:
    loaded = make("llama")
    decoder: Any = loaded.model.get_submodule("model")
    layers = decoder.layers
    layers[0].register_forward_hook(lambda module, args, kwargs, out: layers[1](out, **kwargs), with_kwargs=True)
    refused(loaded, r"it calls model\.layers\.1 where 2 blocks were called before")


def test_hidden_states_that_change_between_blocks_are_refused() -> None:
    loaded = make("llama")
    first = loaded.blocks()[0][1]
    first.register_forward_hook(lambda module, args, out: out * 2)  # as the code of a model might do
    refused(loaded, r"hidden states change between model\.layers\.0 and model\.layers\.1")


def test_an_argument_made_of_what_earlier_blocks_computed_is_refused() -> None:
    loaded = make("llama")
    passed: list[Tensor] = []
    (_, first), (_, second) = loaded.blocks()
    first.register_forward_hook(lambda module, args, out: passed.append(out))
    second.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"residual": passed[-1]}), with_kwargs=True
    )
    refused(loaded, r"an argument of model\.layers\.1 is made of what the blocks before it computed")


def test_an_argument_of_the_text_that_is_no_tensor_of_windows_is_refused() -> None:
    loaded = make("llama")
    seen: list[Tensor] = []
    loaded.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    loaded.blocks()[1][1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"total": seen[-1].sum()}), with_kwargs=True
    )
    refused(loaded, r"an argument of model\.layers\.1 depends on the text and is no tensor of windows")


@pytest.mark.parametrize("writers", [(0, 1), (1,)])
def test_a_block_that_writes_into_an_argument_of_others_is_refused(writers: tuple[int, ...]) -> None:
    loaded = make("llama")
    table: dict[str, Tensor] = {"scale": torch.ones(1)}

    def pass_table(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {"table": table} | kwargs

    layers = loaded.model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    for index, block in enumerate(layers):
        if index not in writers:
            continue
        layers[index] = Odd(block, lambda hidden, kwargs: kwargs["table"].update(more=hidden))
        layers[index].register_forward_pre_hook(pass_table, with_kwargs=True)
    refused(loaded, "writes into an argument that other")
