"""Training of the whole model: its limits, and what it moves."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.methods import W4, same, train
from helpers.notes import Notes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qtool.blocks.job import Job, Method, load_method
from qtool.config import catalog
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.methods import rtn
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.targets import select_targets
from qtool.quant.affine import dequantize
from qtool.quant.trained_linear import QuantLinear
from qtool.system import progress
from qtool.system.errors import InputError, RunError
from qtool.training import end_to_end, linears
from qtool.training.end_to_end import train_model
from qtool.training.fit import windows_of_step

W2 = QuantConfig(num_bits=2, group_size=16, symmetric=False)
TRAINED = [name for name in catalog.methods() if load_method(name).command == "qat"]


@pytest.fixture(params=TRAINED)
def method(request: pytest.FixtureRequest) -> Method[Any]:
    return load_method(request.param)


def minmax(method: Method[Any]) -> dict[str, Any]:
    return {"init": "minmax"} if "init" in method.config.model_fields else {}


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 5))
def test_every_window_is_seen_once_before_any_is_seen_again(size: int, num: int, seed: int) -> None:
    steps = [windows_of_step(step, size, num, seed) for step in range(3 * num)]
    every = [index for step in steps for index in step]
    for epoch in range(len(every) // num):
        assert sorted(every[epoch * num : (epoch + 1) * num]) == list(range(num))
    assert windows_of_step(3, size, num, seed) == steps[3 % len(steps)] or num == 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("still", [{"steps": 0}, {"travel": 0.0, "scale_travel": 0.0, "steps": 2}], ids=str)
@pytest.mark.parametrize("name", ["lsq", "qat"])
def test_no_steps_or_no_rate_is_round_to_nearest(
    name: str, make_llama: Callable[[], LoadedModel], tokens: Tensor, still: dict[str, Any], symmetric: bool
) -> None:
    method, quant = load_method(name), QuantConfig(num_bits=3, group_size=16, symmetric=symmetric)
    still = {key: value for key, value in still.items() if key in method.config.model_fields}
    found, _ = train(method, make_llama(), tokens, quant, **still, **minmax(method))
    nearest = make_llama()
    rtn.run(Job.select(nearest, quant), rtn.Config())
    assert same(found, {name: layer.quantized for name, layer in packed_linears(nearest.model).items()})


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_trainable_parameter_moves(
    method: Method[Any], llama: LoadedModel, tokens: Tensor, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}

    def watched(job: Job, *args: Any, **kwargs: Any) -> Any:
        before.update({name: p.detach().clone() for name, p in job.loaded.model.named_parameters()})
        found = train_model(job, *args, **kwargs)
        after.update({name: p.detach().clone() for name, p in job.loaded.model.named_parameters()})
        return found

    monkeypatch.setattr(linears, "train_model", watched)
    train(method, llama, tokens, QuantConfig(num_bits=2, group_size=16, symmetric=symmetric), **minmax(method))
    layers = [name.removesuffix(".weight") for name in before if name.endswith("_proj.weight")]
    learned = ["weight"]
    if "scale_travel" in method.config.model_fields:
        learned += ["scale", *([] if symmetric else ["zero_point"])]
    moving = {f"{layer}.{part}" for layer in layers for part in learned}
    for name, value in before.items():
        assert torch.equal(value, after[name]) != (name in moving), name


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_llmqat_starts_on_the_grid_of_the_largest_weight(llama: LoadedModel, tokens: Tensor, bits: int) -> None:
    quant = QuantConfig(num_bits=bits, group_size=-1)
    weights = {target.name: target.weight.clone() for target in select_targets(llama, quant)}
    found, _ = train(load_method("llmqat"), llama, tokens, quant, steps=0)
    for name, weight in found.items():
        highest = 2 ** (bits - 1) - 1
        scale = (weights[name].abs().amax(1, keepdim=True) / highest).half().float()
        assert torch.equal(weight.scale, scale)
        assert torch.equal(weight.codes, (weights[name] / scale + highest + 1).round().to(torch.uint8)), name
        assert int(weight.codes.min()) >= 1, "the lowest code goes unused"


def test_paretoq_has_levels_on_both_sides_of_zero_at_2_bits(llama: LoadedModel, tokens: Tensor) -> None:
    quant = QuantConfig(num_bits=2, group_size=-1, symmetric=False, float_zero=True, scale_dtype="float32")
    weights = {target.name: target.weight.clone() for target in select_targets(llama, quant)}
    again = copy.deepcopy(llama)
    found, _ = train(load_method("paretoq"), llama, tokens, quant, steps=0)
    for name, weight in found.items():
        assert bool((weight.zero_point == 1.5).all())
        alpha = weights[name].abs().amax(1, keepdim=True)
        levels = alpha * ((weights[name] / alpha).clamp(-0.99, 0.99).mul(2).sub(0.5).round() + 0.5) / 2
        assert torch.allclose(dequantize(*weight), levels, rtol=1e-4), name
    moved, _ = train(load_method("paretoq"), again, tokens, quant, steps=4)
    assert all(bool((weight.zero_point == 1.5).all()) for weight in moved.values())


def test_paretoq_on_a_grid_of_integers_says_that_it_is_lsq(llama: LoadedModel, tokens: Tensor) -> None:
    notes = Notes()
    with progress.use(notes):
        found, _ = train(load_method("paretoq"), llama, tokens, QuantConfig(num_bits=2, group_size=16), steps=0)
    assert all(bool((weight.zero_point == 2).all()) for weight in found.values())
    assert [note.split(";")[0] for note in notes.texts] == [
        "14 linears of 2 bits are trained with integer zero points, as lsq does"
    ]


def test_training_lowers_the_loss(method: Method[Any], llama: LoadedModel, tokens: Tensor) -> None:
    _, series = train(method, llama, tokens, W2, epochs=40, travel=2.0)
    losses = series["loss"]
    assert len(losses) == 100
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


@pytest.mark.parametrize("loss", ["ce", "reverse-kl", "mixed", "topk-kl", "cakld"])
def test_any_loss_trains(llama: LoadedModel, tokens: Tensor, loss: str) -> None:
    _, series = train(load_method("lsq"), llama, tokens, W2, epochs=16, loss=loss, top_k=8)
    losses = series["loss"]
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10]), losses


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_teacher_is_held_only_where_it_is_asked(
    llama: LoadedModel, tokens: Tensor, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Module] = []
    monkeypatch.setattr(LoadedModel, "float_copy", lambda loaded: made.append(copy.deepcopy(loaded.model)))
    with pytest.raises(AssertionError) if loss == "kl" else copy_nothing():
        train(load_method("lsq"), llama, tokens, steps=1, loss=loss)
    assert len(made) == (loss == "kl")


def copy_nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_the_teacher_shares_every_tensor_and_stays_as_it_is(llama: LoadedModel, tokens: Tensor) -> None:
    teacher = llama.float_copy()
    for name, parameter in llama.model.named_parameters():
        assert teacher.get_parameter(name).data_ptr() == parameter.data_ptr(), name
    before = tiny.logits(teacher)
    train(load_method("lsq"), llama, tokens)
    assert torch.equal(tiny.logits(teacher), before)
    assert torch.equal(tiny.logits(llama.float_copy()), before), "read from its files"


def test_what_is_packed_is_what_was_trained(
    method: Method[Any], llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    last: list[Tensor] = []
    pack = linears.pack_linears

    def watched(model: nn.Module, layers: dict[str, QuantLinear]) -> None:
        last.append(tiny.logits(model).detach())
        pack(model, layers)

    monkeypatch.setattr(linears, "pack_linears", watched)
    train(method, llama, tokens, W2)
    assert torch.equal(tiny.logits(llama.model), last[0])


def test_running_blocks_again_changes_no_bit(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    plain, again = (
        train(load_method("lsq"), make_llama(), tokens, W2, gradient_checkpointing=wanted) for wanted in (False, True)
    )
    assert plain[1] == again[1]
    assert same(plain[0], again[0])


def test_running_blocks_again_holds_less(llama: LoadedModel) -> None:
    held: Counter[bool] = Counter()
    rows = torch.randint(tiny.VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(0))
    llama.model.requires_grad_(True)
    for wanted in (False, True):

        def pack(tensor: Tensor, wanted: bool = wanted) -> Tensor:
            held[wanted] += tensor.nbytes
            return tensor

        with end_to_end._rerun_blocks(llama, wanted), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            llama.model(input_ids=rows, use_cache=False)
    assert held[True] < 0.4 * held[False]


def test_parts_of_a_step_add_up(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    one, parts = (
        train(load_method("lsq"), make_llama(), tokens, W2, batch_size=5, steps=3, optim={"accumulation": count})[1]
        for count in (1, 3)
    )
    assert one["loss"] == pytest.approx(parts["loss"], rel=1e-4)


def test_the_best_state_on_windows_kept_out_is_what_is_packed(
    make_llama: Callable[[], LoadedModel], tokens: Tensor
) -> None:
    """Far too long steps only do harm, so the start is kept; the held-out windows are not trained on."""
    seen: set[int] = set()
    losses = end_to_end._Training._summed

    def watched(self: Any, rows: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.update(rows.tolist())
        return losses(self, rows)

    options = {"validation_samples": 2, "validate_every": 1, "epochs": 2, "travel": 40.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_to_end._Training, "_summed", watched)
        found, series = train(load_method("lsq"), make_llama(), tokens, W4, **options)
    assert seen == {0, 1, 2}
    assert len(series["validation"]) == 1 + len(series["loss"])
    assert series["validation"][0] == min(series["validation"])
    assert same(found, train(load_method("lsq"), make_llama(), tokens, W4, steps=0)[0])


def test_a_loss_that_is_not_finite_ends_the_run(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = end_to_end._Training._summed
    monkeypatch.setattr(end_to_end._Training, "_summed", lambda self, rows: losses(self, rows) * torch.nan)
    with pytest.raises(RunError, match=r"the loss is not finite in step 1; lower the learning rates, or set optim"):
        train(load_method("lsq"), llama, tokens)


def test_what_cannot_train_is_refused(llama: LoadedModel, tokens: Tensor, llama_folder: Path) -> None:
    with pytest.raises(InputError, match="validation_samples 5 of 5 windows leave none to train on"):
        train(load_method("lsq"), copy.deepcopy(llama), tokens, validation_samples=5)
    half = load_model(ModelConfig(path=str(llama_folder), dtype="float16", device="cpu"))
    with pytest.raises(InputError, match=r"gradients do not fit float16; set model\.dtype"):
        train(load_method("lsq"), half, tokens)


def test_half_precision_trains_float32_masters(tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.llama(tmp_path / "float")
    loaded = load_model(ModelConfig(path=str(folder), dtype="bfloat16", device="cpu"))
    dtypes: set[torch.dtype] = set()

    def watched(job: Job, teacher: Any, groups: Any, *args: Any, **kwargs: Any) -> Any:
        dtypes.update(p.dtype for group in groups for p in group.parameters)
        return train_model(job, teacher, groups, *args, **kwargs)

    monkeypatch.setattr(linears, "train_model", watched)
    _, series = train(load_method("lsq"), loaded, tokens, W2, epochs=16)
    assert dtypes == {torch.float32}
    assert sum(series["loss"][-10:]) < 0.9 * sum(series["loss"][:10])
    assert tiny.logits(loaded.model).dtype == torch.bfloat16
