"""LR-QAT: what is frozen, what the factors add, that the end is one matrix of integers, and what a step holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.methods import correlated_inputs
from helpers.weights import gradient, per_weight
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qtool.blocks.job import Job
from qtool.checkpoints import native, output_folder
from qtool.config.quant import BITS, QuantConfig, QuantSpec
from qtool.config.training import RoundingConfig
from qtool.methods import lrqat, rtn
from qtool.methods.lrqat import B_ROW_RMS, Config, Form, LowRankLinear, Phi, input_directions, principal
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.targets import select_targets
from qtool.quant.affine import QuantizedWeight, dequantize, minmax_qparams, quantize, to_grid

FORMS: tuple[Form, ...] = ("fixed", "codes", "bfloat16", "float32")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed))


def make(spec: QuantSpec, w: Tensor | None = None, seed: int = 1, **settings: Any) -> LowRankLinear:
    w = weight() if w is None else w
    return LowRankLinear(w, None, spec, Config(**{"range": "minmax", "rank": 4, **settings}), generator(seed))


def shaken(layer: LowRankLinear, size: float = 0.7) -> LowRankLinear:
    """The layer with factors that move many weights into other cells, and scales that have moved too."""
    with torch.no_grad():
        layer.a.normal_(generator=generator(5)).mul_(size / layer.factor)
        layer.b.normal_(generator=generator(6))
        layer.scale.mul_(1.07)
    return layer


specs = st.builds(
    QuantSpec, num_bits=st.sampled_from(BITS), group_size=st.sampled_from([16, 32, -1]), symmetric=st.booleans()
)


@given(spec=specs, form=st.sampled_from(FORMS))
def test_phi_holds_positions_to_half_of_its_own_step(spec: QuantSpec, form: Any) -> None:
    w = weight()
    grid = to_grid(w, *minmax_qparams(w, spec), spec).flatten(1).clamp(spec.qmin, spec.qmax)
    error = (Phi(grid, spec, form)() - grid).abs().max()
    step = {"fixed": 2.0 ** (spec.num_bits - 8), "codes": 1.0, "bfloat16": spec.middle / 128, "float32": 1e-5}[form]
    assert float(error) <= step / 2 + 1e-4


@given(spec=specs)
def test_phi_takes_a_byte_or_num_bits_for_each_weight(spec: QuantSpec) -> None:
    grid = torch.full((8, 64), float(spec.middle))
    held = {form: 8 * Phi(grid, spec, form).get_buffer("kept").nbytes / grid.numel() for form in FORMS}
    assert held == {"fixed": 8, "codes": spec.num_bits, "bfloat16": 16, "float32": 32}


def test_fixed_and_codes_clip_to_the_grid_and_floats_do_not() -> None:
    spec = QuantSpec(num_bits=3, group_size=-1)
    far = torch.tensor([[-9.0, 0.0, 7.0, 40.0]])
    assert Phi(far, spec, "fixed")().tolist() == [[0.0, 0.0, 7.0, 7.0]]
    assert Phi(far, spec, "codes")().tolist() == [[0.0, 0.0, 7.0, 7.0]]
    assert torch.equal(Phi(far, spec, "float32")(), far)


@given(spec=specs, form=st.sampled_from(["float32", "codes"]))
def test_without_factors_it_is_round_to_nearest(spec: QuantSpec, form: Any) -> None:
    w = weight()
    grid = minmax_qparams(w, spec)
    layer = make(spec, w, phi=form)
    assert torch.equal(layer.quantized.codes, quantize(w, *grid, spec))
    assert torch.equal(layer.quantized_weight(), dequantize(quantize(w, *grid, spec), *grid, spec))


@given(spec=specs)
def test_fixed_point_is_round_to_nearest_but_where_a_weight_is_nearly_between_two_codes(spec: QuantSpec) -> None:
    w = weight()
    grid = minmax_qparams(w, spec)
    off = make(spec, w).quantized.codes.float() - quantize(w, *grid, spec).float()
    assert float(off.abs().max()) <= 1
    between = (to_grid(w, *grid, spec).flatten(1) % 1 - 0.5).abs()
    assert float(between[off != 0].max() if bool((off != 0).any()) else 0) <= 2.0 ** (spec.num_bits - 9) + 1e-5


@given(spec=specs, form=st.sampled_from(FORMS), checkpointed=st.booleans())
def test_absorbing_the_factors_changes_no_bit(spec: QuantSpec, form: Any, checkpointed: bool) -> None:
    layer = shaken(make(spec, phi=form, checkpoint_weights=checkpointed))
    x = torch.randn(3, 64, generator=generator(9))
    assert not torch.equal(layer.quantized.codes, make(spec, phi=form).quantized.codes)
    assert torch.equal(layer(x), layer.freeze()(x))


def test_absorbing_is_exact_under_autocast_too() -> None:
    """The product of the factors must not be taken in half precision during training and in float32 at the end."""
    layer = shaken(make(QuantSpec(num_bits=4, group_size=16)))
    x = torch.randn(3, 64, generator=generator(9)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        trained = layer(x)
    assert torch.equal(trained, layer.freeze()(x))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_gradient", ["plain", "lsq"])
def test_gradients_have_their_closed_form(symmetric: bool, scale_gradient: Any) -> None:
    """dA = alpha / r * GZ B^T, dB = alpha / r * A^T GZ, ds = sum G * (codes - zero point): scale0 is frozen."""
    spec = QuantSpec(num_bits=2, group_size=16, symmetric=symmetric)
    layer = shaken(make(spec, rounding=RoundingConfig(scale_gradient=scale_gradient)))
    g = torch.randn(24, 64, generator=generator(7))
    (layer.quantized_weight() * g).sum().backward()
    scale, zero_point = layer.qparams()
    rounded = layer.grid_weight(scale, zero_point).round()
    assert bool((rounded < 0).any()), "nothing clips, so the test would not see the mask"
    inside = ((rounded >= spec.qmin) & (rounded <= spec.qmax)).float()
    codes = rounded.clamp(spec.qmin, spec.qmax)
    gz = (g.view_as(codes) * scale.unsqueeze(-1) * inside).flatten(1)
    expected = (g.view_as(codes) * (codes - zero_point.unsqueeze(-1))).sum(-1)
    if scale_gradient == "lsq":
        expected /= (16 * (1 if symmetric else 3)) ** 0.5
    for parameter, value in (
        (layer.a, layer.factor * gz @ layer.b.T),
        (layer.b, layer.factor * layer.a.T @ gz),
        (layer.scale, expected),
    ):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, value.detach(), rtol=1e-4, atol=1e-4)


def test_svd_makes_up_for_what_phi_lost() -> None:
    spec = QuantSpec(num_bits=3, group_size=16)
    w = weight(32, 64) * (1 + weight(32, 1, seed=3).abs())
    grid = to_grid(w, *minmax_qparams(w, spec), spec).flatten(1)

    def off(layer: LowRankLinear) -> float:
        return float((layer.grid_weight(*layer.qparams()).detach().flatten(1) - grid).square().sum())

    errors = []
    for rank in (1, 8, 32):
        layer = make(spec, w, phi="codes", factors="svd", rank=rank)
        errors.append(off(layer))
    whole = float((Phi(grid, spec, "codes")() - grid).square().sum())
    assert whole > errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4 * whole, "with all ranks the factors hold everything"
    again = make(spec, w, phi="codes", factors="svd", rank=8, svd_steps=5)
    assert off(again) < errors[1]


@given(spec=specs, form=st.sampled_from(FORMS), seed=st.integers(0, 50))
def test_starts_at_exactly_the_codes_of_a_checkpoint(spec: QuantSpec, form: Any, seed: int) -> None:
    w = weight(seed=seed)
    scale, zero_point = minmax_qparams(w * 0.8, spec)
    near = quantize(w + 0.4 * per_weight(scale, 64).float(), scale, zero_point, spec)
    layer = make(spec, w, phi=form)
    layer.start_from(QuantizedWeight(near, scale, zero_point, spec))
    found = layer.quantized
    assert torch.equal(found.codes, near)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.zero_point, zero_point)


@given(spec=specs, form=st.sampled_from(FORMS), seed=st.integers(0, 50))
def test_no_code_of_a_start_changes_by_a_term_of_a_hundredth(spec: QuantSpec, form: Any, seed: int) -> None:
    w = weight(seed=seed)
    scale, zero_point = minmax_qparams(w * 0.8, spec)
    near = quantize(w + 0.4 * per_weight(scale, 64).float(), scale, zero_point, spec)
    start = QuantizedWeight(near, scale, zero_point, spec)
    layer = make(spec, w, phi=form)
    layer.start_from(start, margin=0.02)
    layer.a.data.normal_(generator=torch.Generator().manual_seed(seed))
    term = (layer.factor * layer.a @ layer.b).detach()
    layer.a.data *= 0.01 / float(term.abs().max())
    assert torch.equal(layer.quantized.codes, start.codes)


@contextmanager
def saved_bytes() -> Iterator[Callable[[], int]]:
    """Counts what a forward keeps for its backward: new tensors only, each once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(kept.values())


def test_with_checkpoint_weights_nothing_of_a_weights_size_is_held() -> None:
    w, x = weight(128, 256), torch.randn(2, 256, generator=generator(1))
    held: dict[bool, int] = {}
    gradients: dict[bool, Tensor] = {}
    for checkpointed in (True, False):
        layer = make(QuantSpec(num_bits=4, group_size=64), w, checkpoint_weights=checkpointed)
        with saved_bytes() as count:
            out = layer(x)
            held[checkpointed] = count()
        out.square().sum().backward()
        gradients[checkpointed] = gradient(layer.a)
    assert held[True] <= x.nbytes + 1024
    assert held[False] >= w.nbytes
    assert torch.equal(gradients[True], gradients[False])


@given(st.integers(1, 12), st.integers(0, 50))
def test_principal_directions_carry_what_the_largest_eigenvectors_do(rank: int, seed: int) -> None:
    x = correlated_inputs(200, 40, seed)
    gram = x.T @ x
    found = principal(gram, rank, generator(seed))
    lengths = found.norm(dim=1)
    unit = found / lengths.unsqueeze(1)
    torch.testing.assert_close(unit @ unit.T, torch.eye(rank), atol=1e-4, rtol=0)
    carried = (unit @ gram @ unit.T).diagonal()
    best = torch.linalg.eigvalsh(gram.double()).flip(0)[:rank].float()
    assert (carried > 0.9 * best).all()
    torch.testing.assert_close((lengths / lengths[0]) ** 4, carried / carried[0], atol=1e-3, rtol=1e-2)
    assert float(lengths.square().mean().sqrt()) == pytest.approx(B_ROW_RMS, rel=1e-4)
    assert torch.equal(found, principal(gram, rank, generator(seed)))


def test_inputs_that_are_never_active_have_directions_too() -> None:
    assert bool(torch.isfinite(principal(torch.zeros(16, 16), 4, generator())).all())


def test_factors_start_where_the_inputs_of_the_float_model_are_large(llama: LoadedModel, tokens: Tensor) -> None:
    before = {name: value.clone() for name, value in llama.model.state_dict().items()}
    targets = select_targets(llama, QuantConfig(num_bits=3, group_size=16))
    found = input_directions(Job(llama, targets, tokens), 4, generator())
    assert found.keys() == {target.name for target in targets}
    assert all(torch.equal(value, before[name]) for name, value in llama.model.state_dict().items())
    read: dict[str, Tensor] = {}
    hooks = [
        t.linear.register_forward_pre_hook(lambda _, args, name=t.name: read.update({name: args[0].flatten(0, -2)}))
        for t in targets
    ]
    with torch.no_grad():
        llama.model(tokens.to(llama.device))
    for hook in hooks:
        hook.remove()
    for name, x in read.items():
        onto = torch.nn.functional.normalize(found[name]).double() @ x.double().T
        best = torch.linalg.eigvalsh(x.double().T @ x.double())[-4:].sum()
        assert float(onto.square().sum()) > 0.98 * float(best), name


def test_only_factors_and_scales_train_and_all_of_them_move(llama: LoadedModel, tokens: Tensor) -> None:
    spec = QuantSpec(num_bits=3, group_size=16, symmetric=False)
    layer = make(spec)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"a", "b", "scale"}
    assert sum(p.numel() for name, p in layer.named_parameters() if name == "weight") == 0
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}
    real = LowRankLinear.freeze

    def spy(self: LowRankLinear) -> Any:
        seen["after"] += [self.a.detach().clone(), self.b.detach().clone(), self.scale.detach().clone()]
        return real(self)

    class Recorded(LowRankLinear):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            seen["before"] += [self.a.detach().clone(), self.b.detach().clone(), self.scale.detach().clone()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRankLinear, "freeze", spy)
        patch.setattr(lrqat, "LowRankLinear", Recorded)
        config = Config(rank=4, steps=3, min_steps=0, batch_size=2, loss="ce")
        lrqat.run(Job.select(llama, QuantConfig(num_bits=3, group_size=16, symmetric=False), tokens), config)
    assert len(seen["before"]) == len(seen["after"]) == 3 * 14
    for before, after in zip(seen["before"], seen["after"], strict=True):
        assert not torch.equal(before, after)


def test_no_steps_is_round_to_nearest(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    quant = QuantConfig(num_bits=3, group_size=16)
    ours, theirs = make_llama(), make_llama()
    lrqat.run(Job.select(ours, quant, tokens), Config(steps=0, phi="float32", range="minmax"))
    rtn.run(Job.select(theirs, quant), rtn.Config())
    expected = packed_linears(theirs.model)
    for name, layer in packed_linears(ours.model).items():
        assert torch.equal(layer.weight_packed, expected[name].weight_packed), name
        assert torch.equal(layer.weight_scale, expected[name].weight_scale), name


def test_training_lowers_the_loss_and_beats_its_start(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    quant = QuantConfig(num_bits=2, group_size=16, symmetric=False)
    found = lrqat.run(Job.select(make_llama(), quant, tokens), Config(rank=8, steps=40, batch_size=5, travel=1.0))
    assert found.values("loss")[-1] < 0.8 * found.values("loss")[0]
    frozen = Config(rank=8, steps=40, batch_size=5, travel=0.0)
    scales_only = lrqat.run(Job.select(make_llama(), quant, tokens), frozen)
    assert found.values("loss")[-1] < 0.95 * scales_only.values("loss")[-1], (
        "the factors give nothing beyond the scales"
    )


@pytest.mark.parametrize("form", FORMS)
def test_goes_on_from_a_checkpoint(form: Any, llama_folder: Path, tmp_path: Path, tokens: Tensor) -> None:
    quant = QuantConfig(num_bits=3, group_size=16, symmetric=False)
    first = tiny.quantize(llama_folder, tmp_path / "start", quant)
    loaded = tiny.load(llama_folder)
    lrqat.run(Job.select(loaded, quant, tokens), Config(steps=0, phi=form, init_from=str(tmp_path / "start")))
    expected = packed_linears(first.model)
    for name, layer in packed_linears(loaded.model).items():
        assert torch.equal(layer.weight_packed, expected[name].weight_packed), name
    with output_folder.atomic_folder(tmp_path / "again", overwrite=False) as partial:
        native.save(partial, loaded, tiny.specs(loaded))
    assert tiny.stored(tmp_path / "again").keys() == tiny.stored(tmp_path / "start").keys()
