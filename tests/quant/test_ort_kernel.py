"""The kernel of ONNX Runtime: exact weights, an input rounded to 8 bits, and a layer that is otherwise unchanged."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.weights import gradient, random_weight, w
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.quant import BITS, SCALE_BITS, QuantSpec
from qtool.quant import affine, kernels, ort_kernel
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packed_linear import PackedLinear

GROUP_SIZES = (-1, 8, 16, 32, 48, 64, 96, 128, 256, 512)
ORT = kernels.of_library("ort")

specs = st.builds(
    w, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.booleans(), st.sampled_from(sorted(SCALE_BITS))
)


def layer_of(weight: QuantizedWeight, bias: Tensor | None = None) -> PackedLinear:
    return PackedLinear.from_quantized(weight, bias)


def probe(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def columns_of(spec: QuantSpec) -> int:
    return 192 if spec.group_size == -1 else spec.group_size * (2 if spec.group_size < 256 else 1)


def served(spec: QuantSpec, columns: int) -> bool:
    """Whether the kernel takes a grid, by its documented limits."""
    size = columns if spec.group_size == -1 else spec.group_size
    return size % (32 if spec.num_bits == 2 else 16) == 0


@settings(max_examples=120, deadline=None)
@given(
    specs,
    st.sampled_from([1, 8, 24, 33]),
    st.integers(1, 9),
    st.integers(0, 99),
    st.sampled_from(["normal", "one side"]),
)
def test_the_error_is_that_of_an_input_rounded_to_8_bits(
    spec: QuantSpec, out_features: int, rows: int, seed: int, kind: str
) -> None:
    columns = columns_of(spec)
    weight = random_weight(spec, out_features, columns, seed)
    x = probe(rows, columns, seed=seed)
    x = x if kind == "normal" else x.abs() + 1
    layer = layer_of(weight)
    reason = layer.accelerate(among=ORT)
    if not served(spec, columns):
        assert "are not a multiple of" in reason
        assert torch.equal(layer(x), F.linear(x, layer.dequantized()))
        return
    assert (reason, layer.kernel and layer.kernel.backend.name) == ("", "ort")
    dense = affine.dequantize(*weight).double()
    sizes = weight.scale.double().unsqueeze(-1) * (affine.grouped(weight.codes, spec) + weight.zero_point.unsqueeze(-1))
    bound = x.double().abs().amax(-1, keepdim=True) / 127 * dense.abs().sum(1)
    bound = bound + 2**-16 * x.double().abs() @ sizes.flatten(1).T
    assert ((layer(x).double() - x.double() @ dense.T).abs() <= bound).all()


@settings(max_examples=60, deadline=None)
@given(specs, st.integers(0, 99))
def test_codes_scales_and_zero_points_are_held_exactly(spec: QuantSpec, seed: int) -> None:
    """An input with one channel is rounded without an error, and gives that channel's weights."""
    columns = columns_of(spec)
    assume(served(spec, columns))
    weight = random_weight(spec, 24, columns, seed)
    layer = layer_of(weight)
    assert layer.accelerate(among=ORT) == ""
    picked = torch.arange(0, columns, columns // 16)
    dense = affine.dequantize(*weight)[:, picked].T
    largest = (spec.qmax * weight.scale.max()).item()
    assert torch.allclose(layer(torch.eye(columns)[picked]), dense, rtol=2**-18, atol=2**-18 * largest)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_of_a_layer_is_below_one_per_cent_and_not_zero(num_bits: int, symmetric: bool) -> None:
    weight = random_weight(w(num_bits, 64, symmetric), 256, 1024)
    layer, x = layer_of(weight), probe(16, 1024)
    expected = layer(x)
    assert layer.accelerate(among=ORT) == ""
    share = (layer(x) - expected).norm() / expected.norm()
    assert 0.001 < share < 0.01


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (w(2, 16), "ort: groups of 16 channels are not a multiple of 32"),
        (w(4, 8), "ort: groups of 8 channels are not a multiple of 16"),
        (QuantSpec(group_size=32, symmetric=False, float_zero=True), "ort: no kernel for zero points between codes"),
        (QuantSpec.model_validate({"grid": "q4_k"}), "ort: no kernel multiplies by codes of q4_k"),
        (QuantSpec.model_validate({"grid": "q6_k"}), "ort: no kernel multiplies by codes of q6_k"),
    ],
    ids=str,
)
def test_a_refusal_says_what_does_not_fit(spec: QuantSpec, reason: str) -> None:
    values = probe(8, 256)
    scale, zero_point = affine.minmax_qparams(values, spec)
    layer = layer_of(QuantizedWeight(affine.quantize(values, scale, zero_point, spec), scale, zero_point, spec))
    assert layer.accelerate(among=ORT).startswith(reason)
    assert layer.kernel is None


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_kernel, "find_spec", lambda name: None)
    reason = layer_of(random_weight(w(4), 16, 64)).accelerate(among=ORT)
    assert reason == 'ort: onnxruntime and onnx not installed: pip install "qtool-llm[ort]"'


def test_a_version_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.27.0")
    reason = layer_of(random_weight(w(4), 16, 64)).accelerate(among=ORT)
    assert reason == 'ort: onnxruntime 1.27.0 is older than 1.28: pip install "qtool-llm[ort]"'


# nothing else of the layer changes


@pytest.fixture
def layer() -> PackedLinear:
    """An accelerated 4-bit layer ``[48, 128]`` with a bias."""
    made = layer_of(random_weight(w(4, 64, False), 48, 128), probe(48, seed=1))
    assert made.accelerate(among=ORT) == ""
    return made


def plain(layer: PackedLinear) -> PackedLinear:
    other = copy.deepcopy(layer)
    other.kernels = ()
    return other


def test_many_rows_and_gradients_take_the_exact_path(layer: PackedLinear) -> None:
    assert layer.kernel is not None
    few = layer.kernel.backend.max_rows
    assert torch.equal(layer(probe(few + 1, 128)), plain(layer)(probe(few + 1, 128)))
    assert not torch.equal(layer(probe(few, 128)), plain(layer)(probe(few, 128)))
    x = probe(2, 128).requires_grad_()
    y = layer(x)
    assert torch.equal(y, plain(layer)(x))
    y.sum().backward()
    assert torch.allclose(gradient(x), layer.dequantized().sum(0).expand(2, -1), atol=1e-5)
    layer.weight_scale = layer.weight_scale.float().requires_grad_()
    assert torch.equal(layer(probe(2, 128)), plain(layer)(probe(2, 128)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inputs_of_any_dtype_and_shape_are_taken_and_not_changed(layer: PackedLinear, dtype: torch.dtype) -> None:
    layer.to(dtype)
    for shape in [(128,), (1, 128), (2, 3, 128)]:
        x = probe(*shape).to(dtype)
        before = x.clone()
        y, expected = layer(x), plain(layer)(x)
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
        assert (y - expected).float().norm() < 0.03 * expected.float().norm()
        assert torch.equal(layer(x), y)
        assert torch.equal(x, before)
    strided = probe(128, 6).to(dtype).T
    assert torch.equal(layer(strided), layer(strided.contiguous()))


def test_the_state_is_that_of_a_layer_without_kernel(layer: PackedLinear) -> None:
    without, accelerated = plain(layer).state_dict(), layer.state_dict()
    assert accelerated.keys() == without.keys()
    assert all(torch.equal(accelerated[name], tensor) for name, tensor in without.items())


def test_a_copy_computes_the_same_and_follows_its_own_weights(layer: PackedLinear) -> None:
    expected = layer(probe(2, 128))
    other = copy.deepcopy(layer)
    assert torch.equal(other(probe(2, 128)), expected)
    new = layer_of(random_weight(w(4, 64, False), 48, 128, seed=7), torch.zeros(48))
    other.load_state_dict(new.state_dict())
    assert other.kernel is not None
    assert other.kernel.backend.name == "ort"
    assert (other(probe(2, 128)) - new(probe(2, 128))).norm() < 0.03 * new(probe(2, 128)).norm()
    assert torch.equal(layer(probe(2, 128)), expected)
    assert layer.to("meta").kernel is None


def test_a_pickle_is_refused_with_what_to_do(layer: PackedLinear) -> None:
    with pytest.raises(TypeError, match=r"cannot be pickled: call use_backend\(model, 'exact'\) before"):
        torch.save(layer, io.BytesIO())
    assert pickle.loads(pickle.dumps(plain(layer))).kernel is None


# threads and memory


@pytest.mark.parametrize(
    ("threads", "weight_bytes", "expected"), [(4, 64, 4), (1, 64, 1), (4, 1 << 20, 1), (4, 1024, 3)]
)
def test_a_session_has_no_more_threads_than_torch_and_its_weight_need(
    threads: int, weight_bytes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(ort_kernel, "THREAD_BYTES", weight_bytes)
    (product,) = ort_kernel.prepare(random_weight(w(4, 64), 48, 128))  # 3072 bytes
    options = product.session.get_session_options()
    assert options.intra_op_num_threads == expected
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_calls_from_several_threads_do_not_mix(layer: PackedLinear) -> None:
    inputs = [probe(1, 128, seed=seed) for seed in range(64)]
    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(layer, inputs))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("num_bits", "held"), [(2, 2), (3, 4), (4, 4), (8, 8)])
def test_the_memory_is_that_of_the_codes_and_twice_the_scales(num_bits: int, held: int) -> None:
    layer = layer_of(random_weight(w(num_bits, 64), 48, 128))
    assert layer.accelerate(among=ORT) == ""
    assert layer.kernel is not None
    assert layer.kernel.num_bytes == 48 * 128 * held // 8 + 2 * 48 * 2 * 4


# a kernel that is wrong is not used


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: 1.1 * y,
        lambda y: y.roll(1, -1),
        lambda y: torch.nan * y,
        lambda y: torch.cat([y[:, :-1], 0 * y[:, -1:]], -1),
    ],
)
def test_a_wrong_product_is_found(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_found", {})
    broken = ORT[0]._replace(matmul=lambda x, product: wrong(ort_kernel.matmul(x, product)))
    layer = layer_of(random_weight(w(4, 64), 48, 1024))
    assert "times its tolerance on a weight 48 x 1024" in layer.accelerate(among=[broken])
    assert layer.kernel is None
