"""The block driver leaves nothing behind when a method, a block or the user interrupts it."""

from collections.abc import Callable

import pytest
import torch
from helpers import tiny
from helpers.block_driving import CONFIGS, W2, make, nearest, pack_all, pack_in_stages, untouched
from torch import Tensor

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job
from qtool.blocks.stages import stages
from qtool.blocks.task import BlockTask
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.targets import select_targets


@pytest.fixture(params=CONFIGS)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return make(request.param)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("with_float_states", [False, True])
@pytest.mark.parametrize("stop_at", range(4))
def test_an_exception_between_stages_leaves_no_patched_forward(
    llama: LoadedModel, tokens: Tensor, stop_at: int, with_float_states: bool
) -> None:
    targets = select_targets(llama, W2)

    def quantize_block(task: BlockTask) -> None:
        for number, stage in enumerate(stages(task)):
            assert not untouched(llama)
            if number == stop_at:
                raise Interrupted
            for target in stage.targets:
                task.pack(target, nearest(target))

    with pytest.raises(Interrupted):
        run_blocks(Job(llama, tuple(targets), tokens), quantize_block, with_float_states=with_float_states)
    assert untouched(llama)
    assert not any("forward" in vars(target.linear) for target in targets)
    assert len(packed_linears(llama.model)) == (0, 3, 4, 6)[stop_at]


def test_a_run_after_an_interrupted_one_is_like_any_other(
    make_llama: Callable[[], LoadedModel], tokens: Tensor
) -> None:
    def interrupted(task: BlockTask) -> None:
        for _ in stages(task):
            raise KeyboardInterrupt

    first, second = make_llama(), make_llama()
    with pytest.raises(KeyboardInterrupt):
        run_blocks(Job.select(first, W2, tokens), interrupted)
    errors = run_blocks(Job.select(first, W2, tokens), pack_in_stages)
    assert errors == run_blocks(Job.select(second, W2, tokens), pack_in_stages)
    assert torch.equal(tiny.logits(first.model), tiny.logits(second.model))


def test_an_exception_inside_the_block_comes_out_and_leaves_no_patched_forward(
    llama: LoadedModel, tokens: Tensor
) -> None:
    def explode(*_: object) -> None:
        raise Interrupted

    def quantize_block(task: BlockTask) -> None:
        for stage in stages(task):
            for target in stage.targets:
                task.pack(target, nearest(target))
            task.block.get_submodule("mlp.act_fn").register_forward_hook(explode)

    with pytest.raises(Interrupted):
        run_blocks(Job.select(llama, W2, tokens), quantize_block)
    assert untouched(llama)


def test_an_exception_while_the_calls_are_recorded_leaves_no_patched_forward(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise Interrupted

    job = Job.select(llama, W2, tokens)
    monkeypatch.setattr(type(llama.blocks()[0][1]), "forward", explode)
    with pytest.raises(Interrupted):
        run_blocks(job, pack_all)
    assert untouched(llama)
