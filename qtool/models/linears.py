"""Decoder blocks and linears in a module tree: finding, reading and replacing them."""

from dataclasses import dataclass, field, replace
from weakref import ReferenceType, ref

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtool.config.quant import QuantSpec
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.trained_linear import QuantLinear
from qtool.system.errors import InputError


@dataclass(frozen=True)
class Target:
    """A linear to quantize: its full name, its grid, the index of its block, and its weight's shape ``(out, in)``.

    The module is only referred to weakly: once it is replaced, its float weight is freed, whoever holds the target.
    """

    name: str
    spec: QuantSpec
    block: int
    weight_shape: tuple[int, int]
    reference: ReferenceType[nn.Module] = field(repr=False, compare=False)

    @classmethod
    def of(cls, name: str, linear: nn.Module, spec: QuantSpec, block: int) -> "Target":
        """The target ``linear``, an ``nn.Linear`` or a ``Conv1D``."""
        rows, columns = stored_weight(linear).shape
        return cls(name, spec, block, (rows, columns), ref(linear))

    def within(self, model: nn.Module) -> "Target":
        """The same linear of another copy of the model."""
        return replace(self, reference=ref(model.get_submodule(self.name)))

    @property
    def linear(self) -> nn.Module:
        """The float module, which must not have been freed."""
        linear = self.reference()
        assert linear is not None, f"{self.name} was replaced, and its float module is gone"
        return linear

    @property
    def weight(self) -> Tensor:
        """Float32 weight ``[out, in]``, a copy where the module stores another dtype or the transpose."""
        return dense_weight(self.linear)

    @property
    def stored_weight(self) -> Tensor:
        """The weight ``[out, in]`` in its stored dtype, a view."""
        return stored_weight(self.linear)


def weight_of(module: nn.Module) -> nn.Parameter:
    """The parameter ``weight`` of a linear or a norm, as it is stored."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def stored_weight(linear: nn.Module) -> Tensor:
    """Weight ``[out, in]`` of an ``nn.Linear`` or a ``Conv1D`` (it stores the transpose) in its own dtype, a view."""
    weight = weight_of(linear).detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def dense_weight(linear: nn.Module) -> Tensor:
    """``stored_weight`` in float32."""
    return stored_weight(linear).float()


def linear_bias(linear: nn.Module) -> Tensor | None:
    """The bias ``[out]`` of a linear, if it has one."""
    bias = linear.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks.

    Raises:
        InputError: when there are none, or when they hold fused experts (3-D parameters).
    """
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(block) for block in module}) == 1
        and any(isinstance(part, nn.Linear | Conv1D | PackedLinear | QuantLinear) for part in module.modules())
    ]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers; it is not supported"
        )
    _, name, blocks = max(lists, key=lambda entry: entry[0])
    fused = [key for key, p in blocks.named_parameters() if p.dim() > 2]
    if fused:
        raise InputError(
            f"{name}.{fused[0]} is a fused {blocks.get_parameter(fused[0]).dim()}-D parameter (mixture of experts); "
            "such models are not supported yet: only linears with 2-D weights are"
        )
    return name, blocks


def replace_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place of the module called ``name``."""
    model.set_submodule(name, layer)


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed linear by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
