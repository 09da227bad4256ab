"""The ``quant`` section of a recipe, and ``QuantSpec``, the grid of one weight."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from qtool.config import grids
from qtool.config.budget import BudgetConfig
from qtool.config.grids import BLOCK_GRIDS, BlockGrid, GridName, NumBits
from qtool.config.section import Section
from qtool.system.errors import InputError

ACTIVATION_KEYS = ("activations", "kv_cache", "kv_group_size")
ACTIVATION_PRESETS = {"a8": (8, 8), "a8kv4": (8, 4), "a4kv4": (4, 4)}  # bits of activations, of kv_cache
ScaleDtype = Literal["float32", "float16", "bfloat16"]
ScaleDtypeOrAuto = Literal["auto", "float32", "float16", "bfloat16"]
SCALE_BITS: dict[str, int] = {"float32": 32, "float16": 16, "bfloat16": 16}
BITS = grids.BITS  # widths of an affine grid
SIGNED_BITS = 4  # largest width at which scales may be negative where no recipe says it
TABLE_IMPLIED = ("num_bits", "group_size", "symmetric")  # keys that the name of a grid implies
GRID_HELP = (
    "affine: the width, groups and zero points that the other keys say; q2_k to q6_k, q4_1, q5_1: the grid of that "
    "type of GGUF, for llama.cpp, whose name implies these keys."
)


def _check_group_size(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("use a positive number of input channels, or -1 for one group per row")
    return value


class ActivationGrid(Section):
    """The grid of the inputs of a linear: each token has a range of its own, made from its values at run time.

    A recipe or a checkpoint may give ``num_bits`` alone, which means an asymmetric grid and is how one is written.
    """

    num_bits: int = Field(
        ge=2,
        le=8,
        description="Bits of the inputs of quantized linears, with one range per token; activations: 8 is short for "
        "num_bits: 8 alone; unset: not rounded.",
    )
    symmetric: bool = Field(
        False,
        description="Range of a token. false: its minimum and maximum, which only native checkpoints support; true: "
        "its largest absolute value to both sides of 0, which int8 kernels compute and compressed-tensors holds.",
    )

    @model_validator(mode="before")
    @classmethod
    def _bits_alone(cls, values: Any) -> Any:
        return values if isinstance(values, Mapping | ActivationGrid) else {"num_bits": values}

    @model_serializer(mode="wrap")
    def _shortest(self, handler: SerializerFunctionWrapHandler) -> Any:
        return handler(self) if self.symmetric else self.num_bits

    def __str__(self) -> str:
        """Return the usual short name, ``8`` or ``8 sym``."""
        return f"{self.num_bits} sym" if self.symmetric else str(self.num_bits)


class NamedGrid(Section):
    """A grid that may have a name of GGUF, which implies the keys ``implied``."""

    implied: ClassVar[tuple[str, ...]]

    grid: GridName = Field("affine", description=GRID_HELP)

    @model_validator(mode="before")
    @classmethod
    def _fill_grid(cls, values: Any) -> Any:
        return grids.filled(values, cls.implied)

    @model_serializer(mode="wrap")
    def _without_usual_grid(self, handler: SerializerFunctionWrapHandler) -> Any:
        """Leave out ``grid: affine``, which earlier versions do not know."""
        values = handler(self)
        return {key: value for key, value in values.items() if (key, value) != ("grid", "affine")}

    @model_validator(mode="after")
    def _as_named(self) -> Self:
        if reason := grids.conflict(self.grid, {key: getattr(self, key) for key in self.implied}):
            raise ValueError(reason)
        return self


class QuantSpec(NamedGrid):
    """The grid of one weight ``[out, in]``: codes ``0 .. 2**num_bits - 1``, one scale and zero point per group.

    A grid also gives the bits that its linear rounds its input to and, in key and value projections, its output.
    """

    implied: ClassVar[tuple[str, ...]] = (*TABLE_IMPLIED, "scale_dtype", "float_zero")

    num_bits: NumBits = Field(4, description="Bits per code; 5 and 6 only in grids of GGUF.")
    group_size: Annotated[int, AfterValidator(_check_group_size)] = Field(
        128,
        description="Input channels that share one scale; must divide the number of input channels. -1: one group per "
        "row.",
    )
    symmetric: bool = Field(
        True, description="Fix the zero point at the middle code and store none; false: store one per group."
    )
    scale_dtype: ScaleDtype = Field(
        "float16", description="Dtype of stored scales; a scale is rounded to it before it is used."
    )
    float_zero: bool = Field(
        False,
        description="Let zero points lie between codes and store them like scales; needs symmetric: false. Only "
        "native checkpoints and dense exports can hold them.",
    )
    negative_scales: bool | None = Field(
        None,
        description="Let scales be negative: the extra level of a symmetric grid (2 bits: -2, -1, 0, 1) then lies on "
        "the side of zero where it lowers the error of a group. unset: true up to 4 bits where "
        "inputs are not rounded (kernels that multiply integers may need positive scales), but with llmqat and "
        "paretoq, whose scales are positive.",
    )
    activations: ActivationGrid | None = Field(
        None, description="Grid of the inputs of quantized linears, or its bits alone; unset: not rounded."
    )
    kv_cache: int | None = Field(
        None,
        ge=2,
        le=8,
        description="Bits of the KV cache (keys and values), with one range per token and head; unset: not rounded. "
        "Only native checkpoints support it.",
    )
    kv_group_size: int | None = Field(
        None, ge=1, description="Channels of keys and values that share one range; unset: all channels of a head."
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if self.float_zero and self.symmetric:
            raise ValueError("float_zero: true needs symmetric: false; a symmetric grid has no zero point to store")
        if self.negative_scales and not self.symmetric:
            raise ValueError(
                "negative_scales: true needs symmetric: true; the zero point of an asymmetric grid says where its "
                "levels lie"
            )
        if self.kv_group_size is not None and self.kv_cache is None:
            raise ValueError("kv_group_size acts only with kv_cache: give both, or neither")
        return self

    @property
    def weights_only(self) -> "QuantSpec":
        """The grid of the weight alone."""
        return QuantSpec(**self.model_dump(include=set(QuantSpec.model_fields), exclude=set(ACTIVATION_KEYS)))

    @property
    def any_sign(self) -> "QuantSpec":
        """The grid of the weight alone, whatever the signs of its scales: equal for weights that may share codes."""
        return self.weights_only.model_copy(update={"negative_scales": None})

    @property
    def blocks(self) -> BlockGrid | None:
        """How scales are stored by blocks, as in GGUF's types; ``None``: on an affine grid, each by itself."""
        return BLOCK_GRIDS.get(self.grid)

    @property
    def signed(self) -> bool:
        """True if scales may be negative."""
        if self.negative_scales is None:
            return self.symmetric and self.num_bits <= SIGNED_BITS and self.activations is None
        return self.negative_scales

    @property
    def free(self) -> "QuantSpec":
        """The affine grid with the same codes and groups whose scales and zero points are any float32 numbers."""
        changes = {"grid": "affine", "scale_dtype": "float32", "float_zero": not self.symmetric}
        return self.model_copy(update=changes)

    @property
    def qmin(self) -> int:
        """The lowest code, always 0."""
        return 0

    @property
    def qmax(self) -> int:
        """The highest code."""
        return int(2**self.num_bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return int(2 ** (self.num_bits - 1))

    def num_groups(self, in_features: int) -> int:
        """The number of groups in one row of ``in_features`` weights."""
        return 1 if self.group_size == -1 else in_features // self.group_size

    def columns_together(self, in_features: int) -> int:
        """The number of input channels whose scales are stored together: a group, or a block of GGUF's types."""
        return in_features // self.num_groups(in_features) if self.blocks is None else self.blocks.block

    @property
    def _stored(self) -> ScaleDtype:
        """The dtype that scales are stored in."""
        return self.scale_dtype

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight, including scales and zero points: ``b + (b + 16) / g``."""
        if self.blocks is not None:
            return self.blocks.bits_per_weight
        scale_bits = SCALE_BITS[self._stored]
        zero_bits = scale_bits if self.float_zero else self.num_bits
        per_group = scale_bits + (0 if self.symmetric else zero_bits)
        return self.num_bits + per_group * self.num_groups(in_features) / in_features

    def label(self) -> str:
        """The usual short name, e.g. ``w4g128``, ``w2g64 asym``, ``w4g64 float zero`` or ``q4_k``."""
        if self.blocks is not None:
            return self.grid
        group = "pc" if self.group_size == -1 else f"g{self.group_size}"
        kind = " float zero" if self.float_zero else " asym"
        return f"w{self.num_bits}{group}" + ("" if self.symmetric else kind)


class QuantOverride(QuantSpec):
    """Changes for the linears that match a pattern; a key that is left out keeps the value of section ``quant``."""

    skip: bool | None = Field(
        None,
        description="true: leave these linears, or matrices of no linear, in floating point; false: quantize them; "
        "unset: quantize them, but for routers and linears of fewer than 32 rows.",
    )

    @model_serializer(mode="wrap")
    def _without_usual_grid(self, handler: SerializerFunctionWrapHandler) -> Any:
        return handler(self)  # grid: affine may replace the grid of the section

    @model_validator(mode="after")
    def _as_named(self) -> Self:
        return self  # an override is a part of a grid, which is checked when the section's own keys complete it

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        return self


class TableGrid(NamedGrid):
    """The grid of an embedding or of the output head; its scales have the dtype of the section's ``scale_dtype``."""

    implied: ClassVar[tuple[str, ...]] = TABLE_IMPLIED

    num_bits: NumBits = Field(8, description="Bits per code; 5 and 6 only in grids of GGUF.")
    group_size: Annotated[int, AfterValidator(_check_group_size)] = Field(
        -1, description="Channels of a row that share one scale; must divide the number of channels. -1: one per row."
    )
    symmetric: bool = Field(
        True, description="Fix the zero point at the middle code and store none; false: store one per group."
    )


def _grid_or(*words: str) -> Callable[[Any], Any]:
    """Return a validator that refuses what is neither one of ``words`` nor a mapping, and says what to write."""

    def check(value: Any) -> Any:
        if isinstance(value, Mapping | TableGrid) or (isinstance(value, str) and value in words):
            return value
        bits = value if isinstance(value, int) and value in BITS else TableGrid.model_fields["num_bits"].default
        raise ValueError(f"write a grid, such as {{num_bits: {bits}}}, or {' or '.join(words)}")

    return check


class QuantConfig(QuantSpec):
    """The grid of all linears in the decoder blocks, overrides by name, and the grids of embedding and output head.

    A pipeline puts a dtype in the place of ``scale_dtype: auto`` (``pipelines/scale_dtype.py``); alone, that means
    float16.
    """

    scale_dtype: ScaleDtypeOrAuto = Field(  # type: ignore[assignment] # a wider type than that of one grid
        "auto",
        description="Dtype of stored scales; a scale is rounded to it before it is used. auto: bfloat16 for a model in "
        "bfloat16, if every export, or the target, holds such scales; else float16.",
    )
    overrides: dict[str, QuantOverride] = Field(
        default_factory=dict,
        description="Linears that differ: shell-style pattern of full linear names -> keys of this section, or skip: "
        "true. Or the path of a file that qtool plan wrote.",
    )
    embedding: Annotated[TableGrid | Literal["float"], BeforeValidator(_grid_or("float"))] = Field(
        "float",
        description="Grid of the embedding: num_bits, group_size, symmetric, e.g. {num_bits: 8}; float: not quantized. "
        "With a budget, num_bits is chosen.",
    )
    head: Annotated[TableGrid | Literal["same", "float"], BeforeValidator(_grid_or("same", "float"))] = Field(
        "same",
        description="Grid of the output head. same: that of the embedding, which is also the head of many models (tied "
        "weights). An untied head is quantized by the method. With a budget, num_bits is chosen.",
    )
    budget: BudgetConfig | None = Field(
        None,
        description="Size limit, within which num_bits is chosen for each linear, and for embedding and head if they "
        "have a grid; unset: num_bits for all.",
    )
    preset: Literal["a8", "a8kv4", "a4kv4"] | None = Field(
        None,
        description="Bits of activations and kv_cache where these keys are not given: a8: 8 and 8; a8kv4: 8 and 4; "
        "a4kv4: 4 and 4.",
    )

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if self.budget is not None and self.blocks is not None:
            raise ValueError(f"a budget chooses num_bits, and grid: {self.grid} has one width; leave out one of them")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("budget") is not None and values.get("num_bits", 0) is None:
            values = {key: value for key, value in values.items() if key != "num_bits"}  # the budget chooses it
        preset = ACTIVATION_PRESETS.get(str(values.get("preset"))) if isinstance(values, dict) else None
        return values if preset is None else dict(zip(ACTIVATION_KEYS, preset, strict=False)) | values

    @property
    def _stored(self) -> ScaleDtype:
        """The dtype of scales; float16 for ``auto``, which no pipeline has replaced."""
        return "float16" if self.scale_dtype == "auto" else self.scale_dtype

    def table_spec(self, grid: TableGrid | str) -> QuantSpec | None:
        """The grid of an embedding or head that ``grid`` describes; ``None``: it stays in floating point."""
        if isinstance(grid, str):
            return None
        own = {} if grid.grid != "affine" else {"scale_dtype": self._stored}
        return QuantSpec(**grid.model_dump(), **own)

    def skips(self, name: str) -> bool | None:
        """The ``skip`` of the last override that matches the weight ``name`` and says it; ``None``: none does."""
        said = [each.skip for pattern, each in self.overrides.items() if fnmatchcase(name, pattern)]
        return next((skip for skip in reversed(said) if skip is not None), None)

    def spec_for(self, name: str) -> QuantSpec | None:
        """The grid of the linear ``name``, or ``None`` if an override skips it; later patterns win."""
        values = self.model_dump(include=set(QuantSpec.model_fields)) | {"scale_dtype": self._stored}
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern):
                changes = override.model_dump(exclude_unset=True, exclude={"skip"})
                if changes.get("kv_cache", 0) is None:  # without a KV cache grid its group size means nothing
                    values["kv_group_size"] = None
                values |= changes
        try:
            return None if self.skips(name) else QuantSpec(**values)
        except ValidationError as error:  # each override is valid, their combination is not
            raise InputError(f"quant.overrides that match {name}: {error.errors()[0]['msg']}") from None
