"""The grids of GGUF's types as data: what the name of a grid implies, and how its scales are stored.

A K type of llama.cpp divides a row into blocks of 256 weights. A block has a float16 number ``d``, and each group of 16
or 32 weights in it an integer ``k``: the scale of the group is ``d * k``. Types with minima store these in the same
way, with a float16 number of their own: ``w = d k code - d_min k_min``. The types of the last two rows have blocks of
32, and a float16 scale and minimum for each. Source: ``ggml-common.h`` of github.com/ggml-org/llama.cpp.
"""

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ValidationInfo

GridName = Literal["affine", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_1", "q5_1"]


class BlockGrid(NamedTuple):
    """A grid whose scales are stored by blocks; ``bits`` and so on are implied by its name."""

    num_bits: int
    group_size: int
    symmetric: bool
    block: int
    """Number of weights that share a float16 number."""
    integer_bits: int
    """Bits of the integer of a group's scale, and of its minimum; 0: the float16 number is the scale."""
    largest: int
    """The largest such integer. Those of symmetric types are signed, and ``-largest`` is the lowest that is used."""

    @property
    def groups(self) -> int:
        """Number of groups in a block."""
        return self.block // self.group_size

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and minima counted."""
        values = 1 if self.symmetric else 2
        return self.num_bits + values * (self.integer_bits / self.group_size + 16 / self.block)

    @property
    def implied(self) -> dict[str, Any]:
        """The keys of section ``quant`` that the name of the grid implies."""
        keys = {"num_bits": self.num_bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return keys | {"scale_dtype": "float16", "float_zero": False}


BLOCK_GRIDS: dict[str, BlockGrid] = {
    "q2_k": BlockGrid(2, 16, False, 256, 4, 15),
    "q3_k": BlockGrid(3, 16, True, 256, 6, 31),
    "q4_k": BlockGrid(4, 32, False, 256, 6, 63),
    "q5_k": BlockGrid(5, 32, False, 256, 6, 63),
    "q6_k": BlockGrid(6, 16, True, 256, 8, 127),
    "q4_1": BlockGrid(4, 32, False, 32, 0, 1),
    "q5_1": BlockGrid(5, 32, False, 32, 0, 1),
}

MIXED_GRIDS = ("q2_k", "q3_k", "q4_k", "q5_k")  # grids around which llama.cpp makes mixtures
BITS = (2, 3, 4, 8)  # widths of an affine grid


def filled(values: Any, keys: tuple[str, ...]) -> Any:
    """Return the ``values`` of a section with those of ``keys`` that the name of its grid implies, where left out."""
    name = values.get("grid") if isinstance(values, dict) else None
    grid = BLOCK_GRIDS.get(name) if isinstance(name, str) else None
    return values if grid is None else {key: grid.implied[key] for key in keys} | values


def check_width(num_bits: int, info: ValidationInfo) -> int:
    """Refuse the widths that only grids of GGUF have, on an affine grid."""
    if num_bits in BITS or info.data.get("grid", "affine") != "affine":
        return num_bits
    others = [name for name, grid in BLOCK_GRIDS.items() if grid.num_bits == num_bits]
    raise ValueError(f"should be 2, 3, 4 or 8; {num_bits} bits are a grid of GGUF: grid: {' or '.join(others)}")


def conflict(name: str, values: dict[str, Any]) -> str | None:
    """Return what in ``values`` contradicts the grid ``name``, and what to do; ``None``: nothing does."""
    grid = BLOCK_GRIDS.get(name)
    if grid is None:
        return None
    wrong = [key for key, value in grid.implied.items() if values.get(key, value) != value]
    if not wrong:
        return None
    said, implied = (", ".join(f"{key}: {json.dumps(each[key])}" for key in wrong) for each in (values, grid.implied))
    return f"grid: {name} has {implied}, and {said} was given; leave out {', '.join(wrong)}, or the grid"


NumBits = Annotated[Literal[2, 3, 4, 5, 6, 8], AfterValidator(check_width)]
