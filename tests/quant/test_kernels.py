"""Kernels of packed linears: within the stated tolerance of the exact product, or not used, with the reason."""

import copy
import io
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.weights import gradient, random_weight, w
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.quant import BITS, SCALE_BITS, QuantSpec
from qtool.quant import affine, kernels, torch_kernels
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packed_linear import PackedLinear

GROUP_SIZES = (-1, 16, 32, 48, 64, 96, 128, 256, 512)


class Case(NamedTuple):
    """A quantized weight, perhaps a bias, and inputs ``[rows, in]``."""

    weight: QuantizedWeight
    bias: Tensor | None
    x: Tensor


def layer_of(weight: QuantizedWeight, bias: Tensor | None = None) -> PackedLinear:
    return PackedLinear.from_quantized(weight, bias)


specs = st.builds(
    w, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.booleans(), st.sampled_from(sorted(SCALE_BITS))
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    spec = draw(specs)
    columns = draw(st.sampled_from([32, 64, 80, 160, 512])) if spec.group_size == -1 else spec.group_size
    columns *= 1 if columns >= 512 else draw(st.integers(1, 3))
    rows = draw(st.sampled_from([8, 16, 24, 32, 48, 80]))
    seed = draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(draw(st.integers(1, 9)), columns, generator=generator)
    if draw(st.booleans()):
        x = x.abs() + 1  # the exact product of the zero differences has no cancellation
    bias = torch.randn(rows, generator=generator) if draw(st.booleans()) else None
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return Case(random_weight(spec, rows, columns, seed), None if bias is None else bias.to(dtype), x.to(dtype))


def served(spec: QuantSpec, rows: int, columns: int) -> str | None:
    """Return the name of the backend for a shape on a CPU, by the kernels' documented limits."""
    if spec.num_bits == 8 and (spec.group_size == -1 or spec.group_size == columns):
        return "int8"
    size = columns if spec.group_size == -1 else spec.group_size
    if size % 32 or rows % 16:
        return None
    return "int4 pairs" if spec.num_bits == 8 else "int4"


def bound(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """Compute the stated tolerance of each output, in float64."""
    codes, scale, zero_point, spec = weight
    per_group = codes.shape[1] // scale.shape[1]
    s, z = (t.double().repeat_interleave(per_group, 1) for t in (scale, zero_point))
    size = s.abs() * ((codes - z).abs() + (2 ** (spec.num_bits - 1) - z).abs() + 2 ** (spec.num_bits - 4))
    return (2**-6 * x.double().abs()).matmul(size.T)


def exact(weight: QuantizedWeight, bias: Tensor | None, x: Tensor) -> Tensor:
    y = x.double() @ affine.dequantize(*weight).double().T
    return y if bias is None else y + bias.double()


@settings(max_examples=150)
@given(cases())
def test_a_kernel_is_within_its_tolerance_and_what_none_holds_stays_exact(case: Case) -> None:
    weight, bias, x = case
    layer = layer_of(weight, bias)
    reference = layer(x)
    reason = layer.accelerate()
    expected = served(weight.spec, *weight.codes.shape)
    if expected is None:
        assert layer.kernel is None
        assert reason
        assert torch.equal(layer(x), reference)
        return
    assert layer.kernel is not None, reason
    assert (layer.kernel.backend.name, reason) == (expected, "")
    y = layer(x)
    assert (y.dtype, y.shape) == (reference.dtype, reference.shape)
    rounding = 2.0**-8 * reference.double().abs() + 2.0**-20  # error of adding the bias in the dtype of x
    assert ((y.double() - exact(weight, bias, x)).abs() <= bound(weight, x) + rounding).all()


@given(specs, st.integers(0, 999))
def test_codes_and_zero_differences_are_held_exactly(spec: QuantSpec, seed: int) -> None:
    """With bfloat16 scales, an input that picks one channel gives that channel's weights, rounded once."""
    spec = spec.model_copy(update={"scale_dtype": "bfloat16"})
    columns = 512 if spec.group_size in (-1, 512) else spec.group_size * 2
    weight = random_weight(spec, 32, columns, seed)
    name = served(spec, 32, columns)
    assume(name is not None)
    assume(spec.num_bits < 4 or spec.symmetric)  # otherwise the zero difference times the scale is rounded
    layer = layer_of(weight)
    layer.accelerate()
    dense = affine.dequantize(*weight)
    picked = torch.arange(0, columns, columns // 32)[:32]
    y = layer(torch.eye(columns)[picked])
    if name == "int4 pairs":  # two halves, each rounded
        upper = 16 * weight.scale.repeat_interleave(columns // weight.scale.shape[1], 1) * 8
        assert ((y - dense[:, picked].T).abs() <= 2.0**-8 * upper[:, picked].T).all()
    else:
        assert torch.equal(y, dense[:, picked].T.bfloat16().float())


@pytest.mark.parametrize(
    ("spec", "shape", "reason"),
    [
        (w(4, 16), (32, 64), "int4: groups of 16 channels are not a multiple of 32"),
        (w(2, 48), (32, 96), "int4: groups of 48 channels are not a multiple of 32"),
        (w(3, -1), (32, 80), "int4: groups of 80 channels are not a multiple of 32"),
        (w(4, 32), (24, 64), "int4: a weight of 24 x 64 is not a multiple of 16 x 32"),
        (w(8, 16), (32, 64), "int8: no kernel for groups, only one scale per row; int4 pairs: groups of 16 channels"),
    ],
)
def test_a_refusal_says_what_does_not_fit(spec: QuantSpec, shape: tuple[int, int], reason: str) -> None:
    layer = layer_of(random_weight(spec, *shape))
    assert reason in layer.accelerate()
    assert layer.kernel is None


@pytest.mark.parametrize(("group_size", "columns", "expected"), [(-1, 1024, 256), (512, 1024, 256), (96, 192, 32)])
def test_a_group_the_kernel_does_not_know_is_cut_evenly(group_size: int, columns: int, expected: int) -> None:
    layer = layer_of(random_weight(w(4, group_size, False), 32, columns))
    assert layer.accelerate() == ""
    assert layer.kernel is not None
    assert layer.kernel.state[1] == expected


@pytest.mark.parametrize("num_bits", [2, 3])
def test_two_and_three_bits_take_what_four_take(num_bits: int) -> None:
    layers = [layer_of(random_weight(w(bits, 128), 64, 256)) for bits in (num_bits, 4)]
    for layer in layers:
        layer.accelerate()
    small, four = (layer.kernel for layer in layers)
    assert small is not None
    assert four is not None
    assert small.backend is four.backend
    assert small.num_bytes == four.num_bytes == 64 * 256 // 2 + 64 * 2 * 2 * 2


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 32])
def test_zero_points_between_codes_are_kept(num_bits: int, group_size: int) -> None:
    codes, scale, zero_point, spec = random_weight(w(num_bits, group_size, False), 32, 96)
    weight = QuantizedWeight(codes, scale, (zero_point + 0.37).clamp(max=spec.qmax), spec)
    kernel, reason = kernels.prepare(weight)
    assert kernel is not None, reason
    x = probe(3, 96)
    assert ((kernel(x) - exact(weight, None, x)).abs() <= bound(weight, x)).all()


# limits of the kernels


@pytest.fixture
def layer() -> PackedLinear:
    """An accelerated 4-bit layer ``[48, 128]`` with a bias."""
    made = layer_of(
        random_weight(w(4, 64, False), 48, 128), torch.randn(48, generator=torch.Generator().manual_seed(1))
    )
    assert made.accelerate() == ""
    return made


def plain(layer: PackedLinear) -> PackedLinear:
    """Return the layer without its kernel."""
    other = copy.deepcopy(layer)
    other.kernels = ()
    return other


def probe(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def test_many_rows_take_the_exact_path(layer: PackedLinear) -> None:
    assert layer.kernel is not None
    few = layer.kernel.backend.max_rows
    for shape in [(few + 1, 128), (2, few, 128), (0, 128)]:
        assert torch.equal(layer(probe(*shape)), plain(layer)(probe(*shape)))
    assert not torch.equal(layer(probe(few, 128)), plain(layer)(probe(few, 128)))


def test_shapes_are_those_of_a_linear(layer: PackedLinear) -> None:
    for shape in [(128,), (1, 128), (2, 3, 128), (1, 2, 2, 128)]:
        assert layer(probe(*shape)).shape == plain(layer)(probe(*shape)).shape
    strided = probe(128, 6).T
    assert torch.equal(layer(strided), layer(strided.contiguous()))


def test_gradients_take_the_exact_path(layer: PackedLinear) -> None:
    x = probe(2, 128).requires_grad_()
    y = layer(x)
    assert torch.equal(y, plain(layer)(x))
    y.sum().backward()
    assert torch.allclose(gradient(x), layer.dequantized().sum(0).expand(2, -1), atol=1e-5)
    layer.weight_scale = layer.weight_scale.float().requires_grad_()
    assert torch.equal(layer(probe(2, 128)), plain(layer)(probe(2, 128)))


def test_the_input_is_not_changed(layer: PackedLinear) -> None:
    x = probe(3, 128).bfloat16()
    before = x.clone()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(x, before)


# nothing else of the layer changes


def test_a_kernel_is_no_part_of_the_state(layer: PackedLinear) -> None:
    without, accelerated = plain(layer).state_dict(), layer.state_dict()
    assert accelerated.keys() == without.keys()
    assert all(torch.equal(accelerated[name], tensor) for name, tensor in without.items())
    assert {name for name, _ in layer.named_buffers()} == {name for name, _ in plain(layer).named_buffers()}
    assert list(layer.children()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_changes_nothing_but_the_bias(layer: PackedLinear, dtype: torch.dtype) -> None:
    x = probe(2, 128).bfloat16()
    assert layer.bias is not None
    assert layer.kernel is not None
    bias, before = layer.bias.to(dtype), layer.kernel(x)
    layer.to(dtype)
    assert torch.equal(layer(x.to(dtype)), before.to(dtype) + bias)


def test_copies_and_pickles_compute_the_same(layer: PackedLinear) -> None:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.kernel is not None
        assert torch.equal(other(probe(2, 128)), layer(probe(2, 128)))


def test_loading_other_weights_makes_the_kernel_again(layer: PackedLinear) -> None:
    other = layer_of(random_weight(w(4, 64, False), 48, 128, seed=7), torch.zeros(48))
    other.accelerate()
    expected = other(probe(2, 128))
    assert not torch.equal(layer(probe(2, 128)), expected)
    layer.load_state_dict(plain(other).state_dict())
    assert torch.equal(layer(probe(2, 128)), expected)


def test_weights_that_leave_memory_take_their_kernel_along(layer: PackedLinear) -> None:
    assert layer.to("meta").kernel is None


# a kernel that is wrong is not used


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> kernels.Backend:
    """The int4 backend of the CPU; earlier trials of kernels are forgotten."""
    backend = next(b for b in kernels.BACKENDS if (b.name, b.device) == ("int4", "cpu"))
    monkeypatch.setattr(kernels, "_found", {})
    return backend


def fails(*_: object) -> Tensor:
    raise RuntimeError("no image for this machine")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"matmul": lambda *args: 1.1 * torch_kernels.int4_cpu(*args)}, "times its tolerance on a weight 48 x 128"),
        ({"matmul": lambda *args: torch_kernels.int4_cpu(*args).roll(1, -1)}, "times its tolerance"),
        ({"matmul": lambda *args: torch.nan * torch_kernels.int4_cpu(*args)}, "off by nan times its tolerance"),
        ({"matmul": fails}, "int4: failed when it was tried: RuntimeError: no image for this machine"),
        ({"prepare": fails}, "int4: failed when it was tried: RuntimeError: no image for this machine"),
        ({"missing": lambda: "torch has no such product"}, "int4: torch has no such product"),
    ],
)
def test_a_backend_that_is_wrong_on_this_machine_is_not_used(
    changes: dict[str, Any], reason: str, broken: kernels.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BACKENDS", (broken._replace(**changes),))
    for seed in (0, 1):  # the second time it is remembered
        layer = layer_of(random_weight(w(4, 64), 48, 128, seed))
        assert reason in layer.accelerate()
        assert torch.equal(layer(probe(2, 128)), F.linear(probe(2, 128), layer.dequantized()))
    (found,) = kernels.examine()
    assert found["reason"]


@pytest.mark.parametrize("row", [0, 17, 47])
def test_one_wrong_row_is_found_however_few_are_compared_at_once(
    row: int, broken: kernels.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*args: Any) -> Tensor:
        y = torch_kernels.int4_cpu(*args)
        y[:, row] += y.abs().max()
        return y

    monkeypatch.setattr(kernels, "PROBED_NUMBERS", 5 * 128)
    monkeypatch.setattr(kernels, "BACKENDS", (broken._replace(matmul=changed),))
    assert "times its tolerance" in layer_of(random_weight(w(4, 64), 48, 128)).accelerate()
    monkeypatch.setattr(kernels, "_found", {})
    monkeypatch.setattr(kernels, "BACKENDS", (broken,))
    assert layer_of(random_weight(w(4, 64), 48, 128)).accelerate() == ""


def test_the_next_backend_serves_where_the_first_is_wrong(
    broken: kernels.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BACKENDS", (broken._replace(name="first", matmul=fails), broken))
    layer = layer_of(random_weight(w(4, 64), 48, 128))
    assert layer.accelerate() == ""
    assert layer.kernel is not None
    assert layer.kernel.backend is broken


def test_each_shape_is_tried_once(broken: kernels.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.Size] = []

    def watched(kernel: kernels.Kernel, weight: QuantizedWeight) -> str:
        tried.append(weight.codes.shape)
        return ""

    monkeypatch.setattr(kernels, "wrong", watched)
    for rows in (48, 48, 32):
        layer_of(random_weight(w(4, 64), rows, 128)).accelerate()
    assert tried == [(48, 128), (32, 128)]


def test_the_machine_is_examined() -> None:
    found = {(row["name"], row["device"]): row["reason"] for row in kernels.examine()}
    assert len(found) == len(kernels.BACKENDS)
    assert all(found[name, "cpu"] is None for name in ("int4", "int8", "int4 pairs"))
    if not torch.cuda.is_available():
        assert {reason for (_, device), reason in found.items() if device == "cuda"} == {"no GPU"}


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [w(b, g, s) for b in BITS for g in (-1, 64, 128) for s in (True, False)], ids=str)
@pytest.mark.parametrize("rows", [1, 8])
def test_a_gpu_kernel_is_within_its_tolerance(spec: QuantSpec, rows: int) -> None:
    weight = random_weight(spec, 256, 512)
    layer = layer_of(weight).cuda()
    assert layer.accelerate() == ""
    x = probe(rows, 512).cuda().bfloat16()
    error = (layer(x).cpu().double() - exact(weight, None, x.cpu())).abs()
    assert (error <= bound(weight, x.cpu())).all()


@pytest.mark.gpu
def test_moving_to_the_gpu_and_back_makes_the_kernel_again(layer: PackedLinear) -> None:
    before = layer(probe(1, 128))
    layer.cuda()
    assert layer.kernel is None or layer.kernel.backend.device == "cuda"
    layer.cpu()
    assert layer.kernel is not None
    assert torch.equal(layer(probe(1, 128)), before)
