"""Methods see the inputs that their packed layers will read: rounded where the grid rounds them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import tiny
from helpers.block_driving import local, nearest, pack_all, pack_in_stages, run_copy
from torch import Tensor

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job
from qtool.blocks.stages import Stage, stages
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantConfig
from qtool.models.loaded import LoadedModel
from qtool.quant.activations import round_input

A3 = QuantConfig.model_validate(
    {"num_bits": 4, "group_size": 16, "activations": {"num_bits": 3, "symmetric": True}, "kv_cache": 3}
)
APART = {"*.k_proj": {"activations": None}, "*.up_proj": {"activations": 4}, "*.1.*.v_proj": {"activations": 8}}


@pytest.mark.parametrize("pausing", [True, False])
@pytest.mark.parametrize("overrides", [{}, APART], ids=["alike", "apart"])
def test_a_stage_has_the_inputs_that_its_packed_layers_read(
    llama: LoadedModel, tokens: Tensor, pausing: bool, overrides: dict[str, object]
) -> None:
    """A layer's hooks run after its rounding, so they show what it multiplies."""
    quant = QuantConfig.model_validate(A3.model_dump(exclude_unset=True) | {"overrides": overrides})
    compared: list[str] = []

    def quantize_block(task: BlockTask) -> None:
        task.pausing = pausing
        found: dict[str, list[Tensor]] = {}
        for stage in stages(task):
            for target in stage.targets:
                found[local(task, target)] = [rows.x for rows in stage.inputs]
            for target in stage.targets:
                task.pack(target, nearest(target))
        for name, inputs in found.items():
            _, expected = run_copy(task.block, task, task.block.get_submodule(name))
            assert all(torch.equal(a, b) for a, b in zip(inputs, expected, strict=True)), name
            compared.append(name)

    run_blocks(Job.select(llama, quant, tokens), quantize_block)
    assert len(compared) == 14


@pytest.mark.parametrize("pausing", [True, False])
def test_inputs_of_the_float_model_are_not_rounded(llama: LoadedModel, tokens: Tensor, pausing: bool) -> None:
    """In the first block both models read the same, before rounding."""
    seen: list[bool] = []

    def quantize_block(task: BlockTask) -> None:
        task.pausing = pausing
        for number, stage in enumerate(stages(task)):
            if task.index == number == 0:
                assert stage.float_inputs is not None
                for rows, floats in zip(stage.inputs, stage.float_inputs, strict=True):
                    assert torch.equal(rows.x, round_input(floats.x, stage.targets[0].spec))
                    seen.append(torch.equal(rows.x, floats.x))
            for target in stage.targets:
                task.pack(target, nearest(target))

    run_blocks(Job.select(llama, A3, tokens), quantize_block, with_float_states=True)
    assert seen
    assert not any(seen)


def test_linears_that_round_one_tensor_differently_are_stages_of_their_own(llama: LoadedModel, tokens: Tensor) -> None:
    found: list[tuple[list[str], list[str]]] = []

    def short(groups: list[list[str]]) -> list[str]:
        return [" ".join(name.rpartition(".")[2].removesuffix("_proj") for name in group) for group in groups]

    def quantize_block(task: BlockTask) -> None:
        together = [[target.name for target in group] for group in task.groups]
        apart = [[target.name for target in stage.targets] for stage in _packing(task)]
        found.append((short(together), short(apart)))

    quant = QuantConfig.model_validate(A3.model_dump(exclude_unset=True) | {"overrides": APART})
    run_blocks(Job.select(llama, quant, tokens), quantize_block)
    together = ["q k v", "o", "gate up", "down"]
    assert found == [
        (together, ["q v", "k", "o", "gate", "up", "down"]),
        (together, ["q", "k", "v", "o", "gate", "up", "down"]),
    ]


def _packing(task: BlockTask) -> Iterator[Stage]:
    for stage in stages(task):
        yield stage
        for target in stage.targets:
            task.pack(target, nearest(target))


@pytest.mark.parametrize("overrides", [{}, APART], ids=["alike", "apart"])
def test_stages_end_where_packing_everything_at_once_ends(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, overrides: dict[str, object]
) -> None:
    quant = QuantConfig.model_validate(A3.model_dump(exclude_unset=True) | {"overrides": overrides})
    logits = []
    for quantize_block in (pack_in_stages, pack_all):
        loaded = make_llama()
        run_blocks(Job.select(loaded, quant, tokens), quantize_block)
        logits.append(tiny.logits(loaded.model))
    assert torch.equal(*logits)
