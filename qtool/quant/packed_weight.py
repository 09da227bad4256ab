"""A weight that is held as packed codes, scales and zero points, as a native checkpoint stores it.

The layers of a quantized model are built on it: ``PackedLinear`` and ``PackedEmbedding``. Buffer names and shapes are
those of ``pack-quantized``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qtool.config.quant import QuantSpec
from qtool.quant import affine, block_scales
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packing import WORD, num_words, pack, unpack, unpack_at
from qtool.system.errors import InputError
from qtool.system.tensors import size_for

FORMAT_VERSION = 1  # version of the native checkpoint's format
ACTIVATIONS_VERSION = 2  # version of a checkpoint that rounds activations or the KV cache: older readers must stop
TABLES_VERSION = 3  # version of a checkpoint with a packed embedding: older readers must stop
GRIDS_VERSION = 4  # version of a checkpoint with a grid of GGUF: older readers must stop
INTEGERS = ("weight_scale_integers", "weight_minimum_integers")  # of the scales and minima that are stored by blocks
PARTS = (  # buffers of a packed weight
    *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
    *("weight_minimum", *INTEGERS),
)

ALL = slice(None)  # all rows of a weight
CHUNK_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 26}  # number of weights expanded at once; a CPU's caches hold 2**19


def empty_parts(in_features: int, out_features: int, spec: QuantSpec) -> dict[str, Tensor]:
    """Return the buffers of a packed weight ``[out, in]`` of zeros, by name."""
    groups, scale_dtype = spec.num_groups(in_features), getattr(torch, spec.scale_dtype)
    parts = {
        "weight": torch.full((1,), float(FORMAT_VERSION)),
        "weight_packed": torch.zeros(out_features, num_words(in_features, spec.num_bits), dtype=torch.int32),
        "weight_scale": torch.zeros(out_features, groups, dtype=scale_dtype),
    }
    if spec.blocks is not None:
        number = torch.zeros(out_features, in_features // spec.blocks.block, dtype=torch.float16)
        integers = torch.zeros(num_words(out_features, spec.blocks.integer_bits), groups, dtype=torch.int32)
        for name, by_group in zip(("weight_scale", "weight_minimum"), INTEGERS, strict=True):
            if name == "weight_scale" or not spec.symmetric:
                parts |= {name: number.clone(), **({by_group: integers.clone()} if spec.blocks.integer_bits else {})}
    elif spec.float_zero:
        parts["weight_zero_point"] = torch.zeros(out_features, groups, dtype=scale_dtype)
    elif not spec.symmetric:
        parts["weight_zero_point"] = torch.zeros(num_words(out_features, spec.num_bits), groups, dtype=torch.int32)
    return parts | {"weight_shape": torch.tensor([out_features, in_features])}


def _rows(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Return rows of ``tensor``; a number below 0 is an error, as in a float embedding."""
    return tensor.index_select(0, rows) if isinstance(rows, Tensor) else tensor[rows]


def _pack_down(values: Tensor, num_bits: int) -> Tensor:
    """Pack integers ``[out, groups]`` along the rows, to int32 words ``[ceil(out b / 32), groups]``."""
    return pack(values.to(torch.uint8).T.contiguous(), num_bits).T.contiguous()


def _unpack_down(words: Tensor, bits: int, rows: slice | Tensor, out_features: int) -> Tensor:
    """Return ``rows`` of integers that are packed along the rows, float32 ``[n, groups]``."""
    if isinstance(rows, Tensor):
        return unpack_at(words, bits, rows).float()
    start, stop, _ = rows.indices(out_features)
    first = start * bits // WORD if start * bits % WORD == 0 else 0  # rows before the first word are not unpacked
    words = words[first : num_words(stop, bits)].T.contiguous()
    skipped = first * WORD // bits
    return unpack(words, bits, stop - skipped)[:, start - skipped :].T.float()


class PackedWeight(nn.Module):
    """The base of layers that hold a weight ``[out, in]`` as packed codes.

    The buffer ``weight`` is one number, the format version. Its shape makes a loader that does not know qtool stop at
    a size mismatch, instead of filling the layer with random numbers. It is a byte in files, and in memory a number of
    the model's dtype, because models ask a layer for the dtype of its weight (``hidden.to(linear.weight.dtype)``).
    """

    in_features: int
    out_features: int
    spec: QuantSpec
    weight: Tensor
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    weight_shape: Tensor

    def hold(self, in_features: int, out_features: int, spec: QuantSpec) -> None:
        """Register the buffers of a weight of zeros, to load tensors into."""
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        for name, buffer in empty_parts(in_features, out_features, spec).items():
            self.register_buffer(name, buffer)

    def fill(self, weight: QuantizedWeight) -> None:
        """Pack ``weight`` into the buffers, which share no memory with it."""
        codes, scale, zero_point, spec = weight
        self.weight_packed = pack(codes, spec.num_bits)
        if spec.blocks is not None:
            self._fill_blocks(scale, zero_point)
            return
        self.weight_scale = scale.to(self.weight_scale.dtype, copy=True)
        assert torch.equal(self.weight_scale.float(), scale), "a scale that its stored dtype does not hold"
        if spec.symmetric:
            assert bool((zero_point == spec.middle).all()), "a symmetric grid with a zero point off the middle"
        elif spec.float_zero:
            self.weight_zero_point = zero_point.to(self.weight_zero_point.dtype, copy=True)
            assert torch.equal(self.weight_zero_point.float(), zero_point), "a zero point that its dtype does not hold"
        else:
            self.weight_zero_point = _pack_down(zero_point, spec.num_bits)

    def _fill_blocks(self, scale: Tensor, zero_point: Tensor) -> None:
        """Store scales and minima ``[out, groups]`` by blocks."""
        grid, values = self.spec.blocks, {"weight_scale": scale}
        assert grid is not None
        if not self.spec.symmetric:
            values["weight_minimum"] = block_scales.minimum(scale, zero_point)
        for least, (name, by_group) in zip((1, 0), zip(values, INTEGERS, strict=False), strict=False):
            number, integers = values[name], None
            if grid.integer_bits:
                number, integers = block_scales.split(number, grid, least)
                setattr(self, by_group, _pack_down(integers.remainder(1 << grid.integer_bits), grid.integer_bits))
            setattr(self, name, number.to(torch.float16, copy=True))
            assert torch.equal(self._by_blocks(name, by_group, ALL), values[name]), "a number that blocks do not hold"

    def _by_blocks(self, name: str, by_group: str, rows: slice | Tensor) -> Tensor:
        """Return the stored scales or minima of ``rows``, float32 ``[n, groups]``."""
        grid, number = self.spec.blocks, _rows(getattr(self, name), rows).float()
        assert grid is not None
        if not grid.integer_bits:
            return number
        integers = _unpack_down(getattr(self, by_group), grid.integer_bits, rows, self.out_features)
        if grid.symmetric:  # negative scales are in two's complement
            integers = torch.where(integers > grid.largest, integers - (1 << grid.integer_bits), integers)
        return block_scales.joined(number, integers, grid)

    def check(self, name: str) -> None:
        """Refuse loaded tensors that do not fit the grid.

        Raises:
            InputError: the tensor that does not fit, whose name is printed after ``name``.
        """
        with torch.device("meta"):
            fitting = empty_parts(self.in_features, self.out_features, self.spec)
        for part, buffer in fitting.items():
            found = self.get_buffer(part)
            if part == "weight" and found.shape == buffer.shape:
                continue  # a byte in files
            if found.shape != buffer.shape or found.dtype != buffer.dtype:
                raise InputError(
                    f"{name}.{part} is {found.dtype} {list(found.shape)}; its grid {self.spec.label()} needs "
                    f"{buffer.dtype} {list(buffer.shape)}"
                )
        shape = [self.out_features, self.in_features]
        if self.weight_shape.device.type != "meta" and self.weight_shape.tolist() != shape:
            raise InputError(f"{name}.weight_shape is {self.weight_shape.tolist()}; the model needs {shape}")

    def mark(self, dtype: torch.dtype) -> None:
        """Let the buffer ``weight`` have the dtype of the model."""
        self.weight = self.weight.to(dtype)

    @property
    def quantized(self) -> QuantizedWeight:
        """Codes, scale and zero point, unpacked."""
        codes = unpack(self.weight_packed, self.spec.num_bits, self.in_features)
        return QuantizedWeight(codes, *self.qparams(), self.spec)

    def qparams(self, rows: slice | Tensor = ALL) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of ``rows``, a slice or numbers ``[n]``, float32 ``[n, groups]``."""
        if self.spec.blocks is not None:
            scale = self._by_blocks("weight_scale", INTEGERS[0], rows)
            if not self.spec.symmetric:
                return scale, self._by_blocks("weight_minimum", INTEGERS[1], rows) / scale
        else:
            scale = _rows(self.weight_scale, rows).float()
        if self.spec.symmetric:
            return scale, torch.full_like(scale, self.spec.middle)
        if self.spec.float_zero:
            return scale, _rows(self.weight_zero_point, rows).float()
        return scale, _unpack_down(self.weight_zero_point, self.spec.num_bits, rows, self.out_features)

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice | Tensor = ALL) -> Tensor:
        """Return ``rows`` of the weight ``[out, in]``, computed in float32 and rounded to ``dtype``, some at a time.

        ``rows`` is a slice, or numbers of rows ``[n]`` in any order.
        """
        scale, zero_point = self.qparams(rows)
        if scale.requires_grad and torch.is_grad_enabled():
            return affine.dequantize(*self.quantized).to(dtype)[rows]
        size = max(1, size_for(scale.device, CHUNK_NUMBERS) // self.in_features)
        packed = _rows(self.weight_packed, rows)
        weight = torch.empty(len(packed), self.in_features, dtype=dtype, device=scale.device)
        if not len(packed):  # a view of no rows has no shape to be found
            return weight
        parts = (tensor.split(size) for tensor in (weight, packed, scale, zero_point))
        for part, words, row_scale, row_zero_point in zip(*parts, strict=True):
            codes = affine.grouped(unpack(words, self.spec.num_bits, self.in_features), self.spec).float()
            if self.spec.blocks is None:
                codes.sub_(row_zero_point.unsqueeze(-1)).mul_(row_scale.unsqueeze(-1))  # affine.dequantize, in place
                part.copy_(codes.flatten(1))
            else:
                part.copy_(affine.from_codes(codes, row_scale, row_zero_point, self.spec))
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the model, but keep the grid in its stored dtype: ``model.half()`` must not change a weight."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype and name != "weight":
                setattr(self, name, buffer.to(moved.device))
        if self.weight_scale.device != before["weight_scale"].device:
            self.changed()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}weight"] = self.weight.to(torch.uint8)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.changed()

    def changed(self) -> None:
        """Act on buffers that have changed or moved; a layer that holds anything made from them overrides this."""
