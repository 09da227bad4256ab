"""Tiny random models of every family pass one contract, and linears get the grids of the recipe."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from helpers.families import CONFIGS, W4, WINDOW, make_config, write
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtool.blocks.driver import run_blocks
from qtool.blocks.folds import find_folds
from qtool.blocks.job import Job
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantConfig
from qtool.methods import gptq, rtn
from qtool.models.linears import dense_weight, packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.targets import select_targets
from qtool.quant.packed_linear import PackedLinear
from qtool.system.errors import InputError

WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3")
TIED = ("smollm", "smollm3", "gemma2", "gemma3", "opt", "gpt2", "falcon", "falcon_new", "falcon_alibi")
BIASED = {  # family -> linears that have a bias, in every block
    "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "qwen2": "q_proj k_proj v_proj",
    "opt": "q_proj k_proj v_proj out_proj fc1 fc2",
    "gpt_neox": "query_key_value dense dense_h_to_4h dense_4h_to_h",
    "gpt2": "c_attn c_proj c_fc c_proj",
    "falcon_alibi": "query_key_value dense dense_h_to_4h dense_4h_to_h",
}
SPLIT = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
FUSED = [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]
GROUPS = dict.fromkeys(CONFIGS, SPLIT) | {
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt_neox": FUSED,
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "falcon": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],  # one norm feeds both branches
    "falcon_new": FUSED,
    "falcon_alibi": FUSED,
}
QKV, GATE_UP = "q_proj k_proj v_proj", "gate_proj up_proj"
LLAMA_FOLDS = {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP, "up_proj": "down_proj"}
GEMMA_FOLDS = {"input_layernorm": QKV, "pre_feedforward_layernorm": GATE_UP, "up_proj": "down_proj"}
FALCON_FOLDS = {"input_layernorm": "query_key_value", "post_attention_layernorm": "dense_h_to_4h"}
FOLDS = dict.fromkeys(CONFIGS, LLAMA_FOLDS) | {
    "gemma2": GEMMA_FOLDS,
    "gemma3": GEMMA_FOLDS,
    "phi3": {"input_layernorm": "qkv_proj", "post_attention_layernorm": "gate_up_proj"},
    # a ReLU commutes with positive scales
    "opt": {"self_attn_layer_norm": QKV, "v_proj": "out_proj", "final_layer_norm": "fc1", "fc1": "fc2"},
    "gpt_neox": FALCON_FOLDS,
    "gpt2": {"ln_1": "c_attn", "ln_2": "c_fc"},
    "smollm": LLAMA_FOLDS | {"v_proj": "o_proj"},  # no grouped queries: every head has its own keys and values
    "olmo2": {"v_proj": "o_proj", "up_proj": "down_proj"},  # OLMo 2's norms come after the linears
    "falcon": {"input_layernorm": "query_key_value dense_h_to_4h"},
    "falcon_new": {"ln_attn": "query_key_value", "ln_mlp": "dense_h_to_4h"},
    "falcon_alibi": FALCON_FOLDS,
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """The float model of a family, loaded from disk once; never change it."""
    made: dict[str, LoadedModel] = {}

    def get(name: str) -> LoadedModel:
        if name not in made:
            made[name] = tiny.load(write(make_config(name), tmp_path_factory.mktemp(name)))
        return made[name]

    return get


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def original(family: str, pristine: Callable[[str], LoadedModel]) -> LoadedModel:
    return pristine(family)


@pytest.fixture
def loaded(original: LoadedModel) -> LoadedModel:
    return copy.deepcopy(original)


@torch.no_grad()
def logits(loaded: LoadedModel, tokens: Tensor) -> Tensor:
    result: Tensor = loaded.model(input_ids=tokens).logits
    return result


def last(name: str) -> str:
    return name.rpartition(".")[2]


def float_tasks(loaded: LoadedModel, tokens: Tensor, visit: Callable[[BlockTask], None]) -> None:
    """Call ``visit`` for each block and leave the block as ``visit`` changed it."""
    targets = select_targets(loaded, W4)
    run_blocks(
        Job(loaded, (), tokens),
        lambda task: visit(replace(task, targets=[t for t in targets if t.block == task.index])),
    )


# ------------------------------------------------------------------------------------- the contract of a family


def test_every_linear_of_every_block_is_a_target_and_runs_in_known_groups(
    family: str, loaded: LoadedModel, tokens: Tensor
) -> None:
    linears = {n: m for n, m in loaded.model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    head = loaded.model.get_output_embeddings()
    inside = {name for name, module in linears.items() if module is not head}
    targets = select_targets(loaded, W4)
    assert {target.name for target in targets} == inside
    assert [target.block for target in targets] == sorted(target.block for target in targets)
    found: list[list[list[str]]] = []
    float_tasks(loaded, tokens, lambda task: found.append([[last(t.name) for t in g] for g in task.groups]))
    assert found == [GROUPS[family]] * 2


def test_the_block_walk_is_the_plain_forward(loaded: LoadedModel, tokens: Tensor) -> None:
    """Each block gets the inputs and arguments that the model itself gives it, bit for bit."""
    plain: list[tuple[Tensor, Tensor]] = []

    def record(block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        plain.append((hidden.clone(), (out[0] if isinstance(out, tuple) else out).clone()))

    hooks = [block.register_forward_hook(record, with_kwargs=True) for _, block in loaded.blocks()]
    logits(loaded, tokens)
    for hook in hooks:
        hook.remove()
    walked: list[tuple[Tensor, Tensor]] = []

    def quantize_block(task: BlockTask) -> None:
        assert task.targets == []
        walked.append((task.inputs[0].clone(), task.forward(task.inputs[0])))

    result = run_blocks(Job(loaded, (), tokens), quantize_block)
    assert [(each.name, each.values) for each in result.series] == [("block_error", (0.0, 0.0))]
    assert len(walked) == len(plain) == 2
    for one, other in zip(walked, plain, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert not torch.allclose(one[0], one[1], rtol=0.1), "the block does nothing; the test says nothing"


@pytest.mark.parametrize("family", WINDOWED, indirect=True)
def test_the_window_of_sliding_attention_is_in_force(
    original: LoadedModel, loaded: LoadedModel, tokens: Tensor
) -> None:
    """Else the equality of block walk and forward would not show that each block gets its own mask."""
    first: list[Tensor] = []

    def outputs(task: BlockTask) -> None:
        if task.index == 0:
            first.append(task.forward(task.inputs[0]))

    run_blocks(Job(loaded, (), tokens), outputs)
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 7) % tiny.VOCABULARY
    run_blocks(Job(loaded, (), changed), outputs)
    differs = (first[0] != first[1]).flatten(2).any(2).any(0)
    assert bool(differs[:WINDOW].all())
    assert not bool(differs[WINDOW:].any())


def test_after_rtn_every_target_is_packed_and_nothing_else_changed(
    family: str, original: LoadedModel, loaded: LoadedModel, tokens: Tensor
) -> None:
    targets = select_targets(loaded, W4)
    rtn.run(Job.select(loaded, W4.model_copy(update={"num_bits": 8})), rtn.Config())
    packed = packed_linears(loaded.model)
    assert set(packed) == {target.name for target in targets}
    assert not any(isinstance(m, nn.Linear | Conv1D) for _, block in loaded.blocks() for m in block.modules())
    kept = dict(loaded.model.named_parameters())
    for name, parameter in original.model.named_parameters():
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(kept[name], parameter), name
    biased = {last(name) for name, layer in packed.items() if layer.bias is not None}
    assert biased == set(BIASED.get(family, "").split())
    for target in targets:
        exact, rounded = dense_weight(original.model.get_submodule(target.name)), packed[target.name].dequantized()
        assert torch.allclose(rounded, exact, atol=float(exact.abs().max()) / 200), target.name
    before, after = logits(original, tokens), logits(loaded, tokens)
    assert 0 < float((after - before).norm() / before.norm()) < 0.05
    embeddings, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    assert (embeddings.weight is head.weight) == (family in TIED)


def test_gptq_runs_and_is_not_rtn(loaded: LoadedModel, original: LoadedModel, tokens: Tensor) -> None:
    """On the first block, where inputs are equal, each linear's output error is below round-to-nearest's."""
    config = gptq.Config(range="minmax")
    gptq.run(Job.select(loaded, W4, tokens), config)
    packed = packed_linears(loaded.model)
    assert set(packed) == {target.name for target in select_targets(original, W4)}
    assert bool(torch.isfinite(logits(loaded, tokens)).all())
    first = [target for target in select_targets(original, W4) if target.block == 0]
    inputs: dict[str, Tensor] = {}

    def record(task: BlockTask) -> None:
        if task.index == 0:
            by_module = {target.linear: target.name for target in first}
            task.observe(
                by_module, lambda m, args, _: inputs.update({by_module[m]: args[0].flatten(0, -2)}), task.inputs
            )

    run_blocks(Job(original, (), tokens), record)
    group = [target for target in first if last(target.name) in GROUPS_OF_FIRST_INPUT]
    assert group
    for target in first:
        nearest = rtn.round_to_nearest(target.weight, target.spec, rtn.Config())
        assert not torch.equal(packed[target.name].quantized.codes, nearest.codes), target.name
    for target in group:
        nearest = rtn.round_to_nearest(target.weight, target.spec, rtn.Config())
        x = inputs[target.name]
        ours = float(((packed[target.name].dequantized() - target.weight) @ x.T).square().sum())
        theirs = float(
            ((PackedLinear.from_quantized(nearest, None).dequantized() - target.weight) @ x.T).square().sum()
        )
        assert ours < 0.8 * theirs, (target.name, ours, theirs)


GROUPS_OF_FIRST_INPUT = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn")


def named(task: BlockTask, module: nn.Module) -> str:
    return last(next(name for name, other in task.block.named_modules() if other is module))


def test_awq_folds_where_it_can_and_leaves_the_output_as_it_was(
    family: str, original: LoadedModel, loaded: LoadedModel, tokens: Tensor
) -> None:
    def visit(task: BlockTask) -> None:
        state = {name: value.clone() for name, value in task.block.state_dict().items()}
        folds = find_folds(task, task.inputs[0][:1])
        found = {named(task, fold.source): " ".join(last(t.name) for t in fold.readers) for fold in folds}
        assert found == FOLDS[family]
        for name, value in task.block.state_dict().items():
            assert torch.equal(value, state[name]), f"the search left {name} changed"
        before = task.forward(task.inputs[0])
        for fold in folds:
            channels = fold.readers[0].weight.shape[1]
            s = torch.exp2(torch.linspace(-3, 3, channels)[torch.randperm(channels)])
            fold.apply(s, torch.float32)
        assert torch.allclose(task.forward(task.inputs[0]), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
        moved = {
            name.rpartition(".")[0] for name, value in task.block.state_dict().items() if not value.equal(state[name])
        }
        assert {last(name) for name in moved} == {name for pair in found.items() for name in " ".join(pair).split()}

    torch.manual_seed(0)
    float_tasks(loaded, tokens, visit)
    before, after = logits(original, tokens), logits(loaded, tokens)
    assert torch.allclose(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi3"], indirect=True)
def test_a_folded_norm_is_a_value_of_its_stored_dtype_and_the_readers_take_what_is_left(
    family: str, loaded: LoadedModel, tokens: Tensor
) -> None:
    def visit(task: BlockTask) -> None:
        before = task.forward(task.inputs[0])
        for fold in find_folds(task, task.inputs[0][:1]):
            if fold.exact_source:
                fold.apply(torch.exp2(torch.linspace(-1, 1, 64)), torch.bfloat16)
                weight = fold.source.get_parameter("weight").detach()
                assert torch.equal(weight.bfloat16().float(), weight)
        assert torch.allclose(task.forward(task.inputs[0]), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))

    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.copy_(parameter.bfloat16())
    float_tasks(loaded, tokens, visit)


# ----------------------------------------------------------------------------------------------------- targets


def test_overrides_choose_the_grid_by_name_and_later_ones_win(llama: LoadedModel) -> None:
    overrides = {
        "*.mlp.*": {"num_bits": 2},
        "*.down_proj": {"num_bits": 8, "symmetric": False},
        "model.layers.1.*": {"skip": True},
        "model.layers.1.self_attn.q_proj": {"skip": False, "group_size": -1},
        "*.k_proj": {"symmetric": False},  # an override that does not mention skip
    }
    targets = select_targets(llama, QuantConfig(num_bits=4, group_size=16, overrides=overrides))
    labels = {target.name.removeprefix("model.layers."): target.spec.label() for target in targets}
    assert labels == {
        **{f"0.self_attn.{part}_proj": "w4g16" for part in "qvo"},
        "0.self_attn.k_proj": "w4g16 asym",
        "0.mlp.gate_proj": "w2g16",
        "0.mlp.up_proj": "w2g16",
        "0.mlp.down_proj": "w8g16 asym",
        "1.self_attn.q_proj": "w4pc",
    }


def test_a_group_size_that_does_not_divide_lists_the_channels_and_what_divides_them(llama: LoadedModel) -> None:
    with pytest.raises(InputError) as refused:
        select_targets(llama, QuantConfig(group_size=64))
    lines = str(refused.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["model.layers.0.mlp.down_proj.weight"]
    assert "has 96 input channels, and group_size 64 does not divide that" in lines[0]
    assert lines[0].endswith("(and 1 more like it)")  # the same linear of the other block
    with pytest.raises(InputError) as refused:
        select_targets(llama, QuantConfig(group_size=48))  # wrong for the six linears of 64 channels in both blocks
    (line,) = str(refused.value).splitlines()[1:]
    assert line.endswith("(and 11 more like it)")
    assert "choose one that does: 16, 32, 64, or -1 for one group per row" in line
    overrides = {"*.down_proj": {"group_size": 32}}
    assert len(select_targets(llama, QuantConfig(group_size=64, overrides=overrides))) == 14


def test_an_override_that_matches_nothing_is_refused_with_the_nearest_name(llama: LoadedModel) -> None:
    overrides = {"model.layers.0.mlp.down_prj": {"num_bits": 8}, "*.o_proj": {"num_bits": 8}}
    with pytest.raises(InputError, match=r"no linear matches 'model\.layers\.0\.mlp\.down_prj'") as refused:
        select_targets(llama, QuantConfig(group_size=16, overrides=overrides))
    assert str(refused.value).endswith("the nearest of 14 names is model.layers.0.mlp.down_proj")


def test_a_recipe_that_skips_everything_is_refused(llama: LoadedModel) -> None:
    with pytest.raises(InputError, match="skip every linear"):
        select_targets(llama, QuantConfig(group_size=16, overrides={"*": {"skip": True}}))


def test_all_faults_of_a_recipe_are_named_at_once(llama: LoadedModel) -> None:
    with torch.no_grad():
        llama.model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = float("nan")
    llama.extremes.clear()  # they were found when it was loaded
    with pytest.raises(InputError) as refused:
        select_targets(llama, QuantConfig(group_size=64, overrides={"*.k_prj": {"num_bits": 8}}))
    text = str(refused.value)
    for part in ("'*.k_prj'", "0.mlp.down_proj", "(and 1 more like it)", "1.mlp.up_proj.weight holds 1 NaN"):
        assert part in text
