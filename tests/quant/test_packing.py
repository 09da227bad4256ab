"""Packing: the bit stream equals that of other libraries, and buffers have the size of the formula."""

import importlib
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.quant import BITS, SCALE_BITS, QuantSpec
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.packing import num_words, pack, unpack


def random_codes(rows: int, columns: int, num_bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**num_bits, (rows, columns), dtype=torch.uint8, generator=generator)


# ----------------------------------------------------------------------------------------------------- packing

code_tensors = st.builds(
    lambda bits, rows, columns, seed: (random_codes(rows, columns, bits, seed), bits),
    st.sampled_from((*BITS, 5, 6)),
    st.integers(1, 5),
    st.integers(1, 100),
    st.integers(0, 999),
)


@given(code_tensors)
def test_unpack_undoes_pack_on_any_shape(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (codes.shape[0], num_words(codes.shape[1], bits))
    assert torch.equal(unpack(words, bits, codes.shape[1]), codes)


@given(code_tensors)
def test_pack_is_the_bit_stream_least_significant_bit_first(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    for row, words in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        stream = "".join(format(code, f"0{bits}b")[::-1] for code in row)
        stream += "0" * (-len(stream) % 32)
        expected = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
        assert [word % 2**32 for word in words] == expected


@pytest.fixture(scope="module")
def compressed_tensors() -> ModuleType:
    pytest.importorskip("compressed_tensors")
    for name in ("pack_quantized.helpers", "quantized_compressors.pack_quantized"):  # newest first
        try:
            return importlib.import_module(f"compressed_tensors.compressors.{name}")
        except ModuleNotFoundError:
            continue
    pytest.fail("this compressed-tensors has its packer elsewhere; say here where")


@given(case=code_tensors)
def test_pack_is_that_of_compressed_tensors_along_rows_and_columns(
    compressed_tensors: ModuleType, case: tuple[Tensor, int]
) -> None:
    codes, bits = case
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), compressed_tensors.pack_to_int32(signed, bits))
    along_rows = compressed_tensors.pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(pack(codes.T.contiguous(), bits).T, along_rows)


@pytest.mark.parametrize("bits", BITS)
def test_pack_holds_both_ends_of_the_grid(bits: int) -> None:
    for code in (0, 2**bits - 1):
        codes = torch.full((2, 33), code, dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, 33), codes)


def test_three_bits_straddle_words_as_gptq_has_it() -> None:
    """Value 10 is split over words 0 and 1, value 21 over words 1 and 2."""
    for value, words in ((9, [0]), (10, [0, 1]), (11, [1]), (21, [1, 2]), (22, [2])):
        codes = torch.zeros(1, 32, dtype=torch.uint8)
        codes[0, value] = 7
        assert pack(codes, 3)[0].nonzero().flatten().tolist() == words


# ----------------------------------------------------------------------------------------------------- storage


@given(
    st.sampled_from(BITS),
    st.sampled_from([-1, 8, 16, 32]),
    st.booleans(),
    st.sampled_from(sorted(SCALE_BITS)),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_bits_per_weight_are_the_bytes_of_the_buffers(
    bits: int, group_size: int, symmetric: bool, scale_dtype: str, rows: int, columns: int
) -> None:
    """Sizes are multiples of 32, so that no word is padded."""
    spec = QuantSpec(num_bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    layer = PackedLinear(32 * columns, 32 * rows, spec)
    stored = [buffer for name, buffer in layer.named_buffers() if name not in ("weight", "weight_shape")]
    assert len(stored) == (2 if symmetric else 3)
    num_bytes = sum(buffer.numel() * buffer.element_size() for buffer in stored)
    assert 8 * num_bytes / (32 * rows * 32 * columns) == pytest.approx(spec.bits_per_weight(32 * columns), rel=1e-12)


@pytest.mark.parametrize(
    ("bits", "published"),
    [
        (4, {32: 4.63, 64: 4.31, 128: 4.16, 256: 4.08}),
        (3, {32: 3.59, 64: 3.30, 128: 3.15, 256: 3.07}),
        (2, {32: 2.56, 64: 2.28, 128: 2.14, 256: 2.07}),
    ],
)
def test_bits_per_weight_are_those_of_the_efficientqat_paper(bits: int, published: dict[int, float]) -> None:
    """Asymmetric, float16 scales (arXiv 2407.11062): ``b + (b + 16) / g``."""
    for group_size, value in published.items():
        spec = QuantSpec(num_bits=bits, group_size=group_size, symmetric=False)
        assert spec.bits_per_weight(4096) == pytest.approx(value, abs=0.0051)
