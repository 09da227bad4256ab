"""The block driver: every linear sees exactly what it would see if the block were run again from its start."""

import copy
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from helpers.block_driving import (
    CONFIGS,
    W2,
    float_states,
    local,
    make,
    nearest,
    pack_all,
    pack_in_stages,
    run_copy,
    untouched,
)
from torch import Tensor, nn

from qtool.blocks import states
from qtool.blocks.calls import BlockCall
from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job
from qtool.blocks.stages import stages
from qtool.blocks.states import PROBED_WINDOWS
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantConfig
from qtool.models.linears import linear_bias, replace_linear
from qtool.models.loaded import LoadedModel
from qtool.quant.packed_linear import PackedLinear


@pytest.fixture(params=CONFIGS)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return make(request.param)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two windows of 24 tokens; of five windows the last is alone."""
    monkeypatch.setattr(states, "TOKENS_PER_BATCH", 48)


def equal(ours: Iterable[Tensor] | None, theirs: list[Tensor]) -> bool:
    return ours is not None and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------ stages


@pytest.mark.usefixtures("small_batches")
def test_stages_give_what_running_the_block_again_would_give(loaded: LoadedModel, tokens: Tensor) -> None:
    """They agree bit for bit, for every group and batch, the last and smaller batch included."""
    compared: list[int] = []

    def quantize_block(task: BlockTask) -> None:
        again = copy.deepcopy(task.block)
        assert [x.shape[0] for x in task.inputs] == [2, 2, 1]
        for stage in stages(task):
            _, expected = run_copy(again, task, again.get_submodule(local(task, stage.targets[0])))
            assert equal((rows.x for rows in stage.inputs), expected)
            assert stage.float_inputs is None
            compared.append(len(expected))
            for target in stage.targets:
                weight = nearest(target)
                task.pack(target, weight)
                bias = linear_bias(target.linear)
                replace_linear(again, local(task, target), PackedLinear.from_quantized(weight, bias))
        assert equal(task.outputs, run_copy(again, task)[0])
        assert equal(task.outputs, run_copy(task.block, task)[0])
        assert task.float_outputs is None

    run_blocks(Job.select(loaded, W2, tokens), quantize_block)
    assert len(compared) >= 6
    assert set(compared) == {3}


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_stages_end_where_packing_everything_at_once_ends(
    family: str, tmp_path_factory: pytest.TempPathFactory, tokens: Tensor
) -> None:
    """This holds also if a linear is a ``Conv1D`` or reads flattened tokens."""
    pristine = tiny.load(tiny.FAMILIES[family](tmp_path_factory.mktemp(family)))
    logits = []
    for quantize_block in (pack_in_stages, pack_all):
        loaded = copy.deepcopy(pristine)
        run_blocks(Job.select(loaded, W2, tokens), quantize_block)
        logits.append(tiny.logits(loaded.model))
    assert torch.equal(*logits)


def test_later_groups_see_the_groups_before_them_quantized(llama: LoadedModel, tokens: Tensor) -> None:
    changes: dict[str, float] = {}

    def quantize_block(task: BlockTask) -> None:
        fresh = copy.deepcopy(task.block)
        for stage in stages(task):
            _, plain = run_copy(fresh, task, fresh.get_submodule(local(task, stage.targets[0])))
            changes[stage.targets[0].name] = float((next(iter(stage.inputs)).x - plain[0]).norm() / plain[0].norm())
            for target in stage.targets:
                task.pack(target, nearest(target))

    run_blocks(Job.select(llama, W2, tokens), quantize_block)
    first = {name: change for name, change in changes.items() if name.startswith("model.layers.0.")}
    assert first.pop("model.layers.0.self_attn.q_proj") == 0
    assert len(first) == 3
    assert all(change > 0.05 for change in first.values()), first


def test_linears_that_read_the_same_tensor_are_one_group_in_the_order_they_run(
    llama: LoadedModel, tokens: Tensor
) -> None:
    found: list[list[list[str]]] = []

    def quantize_block(task: BlockTask) -> None:
        found.append([[target.name.rpartition(".")[2] for target in group] for group in task.groups])
        pack_all(task)

    run_blocks(Job.select(llama, W2, tokens), quantize_block)
    assert found == [[["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]] * 2


def test_linears_that_stay_in_floating_point_are_in_no_group(llama: LoadedModel, tokens: Tensor) -> None:
    overrides = {"*.q_proj": {"skip": True}, "*.0.mlp.*": {"skip": True}, "*.layers.1.*": {"skip": True}}
    quant = QuantConfig(num_bits=2, group_size=16, overrides=overrides)
    found: list[list[list[str]]] = []

    def quantize_block(task: BlockTask) -> None:
        before = run_copy(copy.deepcopy(task.block), task)[0]
        found.append([[target.name.rpartition(".")[2] for target in group] for group in task.groups])
        pack_in_stages(task)
        assert equal(task.outputs, before) == (task.index == 1)

    run_blocks(Job.select(llama, quant, tokens), quantize_block)
    assert found == [[["k_proj", "v_proj"], ["o_proj"]], []]


# ------------------------------------------------------------------------------------------------ float stream


@pytest.mark.parametrize("loaded", ["llama", "gemma3", "falcon"], indirect=True)
@pytest.mark.usefixtures("small_batches")
def test_the_float_stream_is_the_float_model(loaded: LoadedModel, tokens: Tensor) -> None:
    """This holds in every stage and after every block, whatever was packed meanwhile."""
    count = 0
    for task, stage, expected in float_states(loaded, tokens):
        where = f"block {task.index}, " + ("its output" if stage is None else stage.targets[0].name)
        found = task.float_outputs if stage is None else [rows.x for rows in stage.float_inputs or ()]
        assert equal(found, expected), where
        count += 1
    assert count >= 8


@pytest.mark.usefixtures("small_batches")
def test_the_quantized_stream_is_the_same_beside_a_float_stream(loaded: LoadedModel, tokens: Tensor) -> None:
    other = copy.deepcopy(loaded)
    errors = run_blocks(Job.select(loaded, W2, tokens), pack_in_stages)
    assert run_blocks(Job.select(other, W2, tokens), pack_in_stages, with_float_states=True) == errors


def test_a_float_stream_without_stages_is_our_mistake(llama: LoadedModel, tokens: Tensor) -> None:
    with pytest.raises(AssertionError, match="sets the float outputs of each task"):
        run_blocks(Job.select(llama, W2, tokens), pack_all, with_float_states=True)


# -------------------------------------------------------------------------------------------------- the driver


def test_a_run_leaves_no_patched_forward_and_no_hook(loaded: LoadedModel, tokens: Tensor) -> None:
    run_blocks(Job.select(loaded, W2, tokens), pack_in_stages)
    assert untouched(loaded)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in loaded.model.modules())


def test_each_block_is_fed_by_the_quantized_blocks_before_it(loaded: LoadedModel, tokens: Tensor) -> None:
    """The driver feeds the last block with the hidden states that the quantized model itself feeds to it."""
    walked: list[Tensor] = []

    def quantize_block(task: BlockTask) -> None:
        walked.append(task.inputs[0])
        pack_in_stages(task)

    run_blocks(Job.select(loaded, W2, tokens), quantize_block)
    found: list[Tensor] = []
    hook = loaded.blocks()[1][1].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        loaded.model(input_ids=tokens)
    hook.remove()
    assert torch.equal(walked[1], found[0])


def test_the_size_of_batches_does_not_matter(
    loaded: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, tables and biases are recorded for each size, so the last and smaller batch has its own."""
    results = []
    for size in (10**6, 72, 48, 1):
        monkeypatch.setattr(states, "TOKENS_PER_BATCH", size)
        outputs: list[Tensor] = []

        def quantize_block(task: BlockTask, outputs: list[Tensor] = outputs) -> None:
            outputs[:] = [torch.cat([task.forward(x) for x in task.inputs])]

        run_blocks(Job(loaded, (), tokens), quantize_block)
        results.append(outputs[0])
    for result in results[1:]:
        assert torch.allclose(result, results[0], rtol=1e-4, atol=1e-5 * float(results[0].abs().max()))


def test_a_block_is_called_with_what_was_recorded_for_that_size_of_batch(llama: LoadedModel, tokens: Tensor) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float, shift: Tensor) -> tuple[Tensor]:
            return (x * scale + shift,)

    calls = {size: BlockCall((float(size),), {"shift": torch.tensor(size)}) for size in (1, 2, 3)}

    def visit(task: BlockTask) -> None:
        scaled = replace(task, block=Scaled(), calls=calls)
        assert [float(scaled.forward(torch.ones(size, 1, 1))[0]) for size in (3, 1, 2)] == [6.0, 2.0, 4.0]

    run_blocks(Job(llama, (), tokens), visit)


@pytest.mark.usefixtures("small_batches")
def test_masks_are_recorded_for_every_size_of_batch_and_every_block(tokens: Tensor) -> None:
    masks: list[dict[int, Tensor | None]] = []

    def walk(task: BlockTask) -> None:
        masks.append({size: call.kwargs["attention_mask"] for size, call in task.calls.items()})

    run_blocks(Job(make("gemma3"), (), tokens), walk)
    everything = masks[1]
    local = {size: mask for size, mask in masks[0].items() if mask is not None}
    assert {size: mask.shape[0] for size, mask in local.items()} == {1: 1, 2: 2}
    assert local[1][0, 0].sum(-1).tolist() == [min(position, 8) for position in range(1, 25)]
    assert set(everything) == {1, 2}
    assert all(mask is None or not torch.equal(mask, local[size]) for size, mask in everything.items())


@pytest.mark.usefixtures("small_batches")
def test_the_errors_are_relative_output_errors_on_the_first_windows(llama: LoadedModel, tokens: Tensor) -> None:
    expected: list[float] = []

    def quantize_block(task: BlockTask) -> None:
        before = run_copy(task.block, task)[0][0][:PROBED_WINDOWS].double()
        pack_in_stages(task)
        after = run_copy(task.block, task)[0][0][:PROBED_WINDOWS].double()
        size = before.square().mean(-1, keepdim=True)  # mean square of each token, [b, t, 1]
        error, share = ((x / size.sqrt()).square().flatten(0, 1).mean(0) for x in (after - before, before))  # [d]
        expected.append(float((error / share).mean()))

    errors = run_blocks(Job.select(llama, W2, tokens), quantize_block).values("block_error")
    assert errors == pytest.approx(expected, rel=1e-4)
    assert all(0.001 < error < 1 for error in errors)


def test_a_method_that_leaves_a_target_is_caught(llama: LoadedModel, tokens: Tensor) -> None:
    def leave_the_last(task: BlockTask) -> None:
        for target in task.targets[:-1]:
            task.pack(target, nearest(target))

    with pytest.raises(AssertionError, match=r"left these targets unquantized: \['model\.layers\.0\.mlp\.down_proj'\]"):
        run_blocks(Job.select(llama, W2, tokens), leave_the_last)


def test_the_errors_are_numbers_in_half_precision(llama: LoadedModel, tokens: Tensor) -> None:
    """Sums of squares of hidden states are beyond float16."""
    with torch.no_grad():
        llama.model.get_parameter("model.embed_tokens.weight").mul_(100)
    llama.model.half()
    errors = run_blocks(Job.select(llama, W2, tokens), pack_in_stages).values("block_error")
    assert all(0 < error < 1 for error in errors), errors
