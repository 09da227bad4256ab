"""Decoder blocks and linears in a module tree: finding, reading and replacing them.

Nothing is known of any architecture. The decoder blocks are the ``ModuleList`` of modules of one class that holds the
most parameters; the linears are all ``nn.Linear`` and ``Conv1D`` inside. ``Conv1D`` is the linear of GPT-2, which
stores its weight as ``[in, out]``; here a weight is always ``[out, in]``.
"""

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

    A target refers to its module weakly: once the module is replaced, its float weight is freed, although the target
    still exists.
    """

    name: str
    spec: QuantSpec
    block: int
    weight_shape: tuple[int, int]
    reference: ReferenceType[nn.Module] = field(repr=False, compare=False)

    @classmethod
    def of(cls, name: str, linear: nn.Module, spec: QuantSpec, block: int) -> "Target":
        """Return the target ``linear``, an ``nn.Linear`` or a ``Conv1D``."""
        rows, columns = stored_weight(linear).shape
        return cls(name, spec, block, (rows, columns), ref(linear))

    def within(self, model: nn.Module) -> "Target":
        """Return the same linear of ``model``, another copy of the model."""
        return replace(self, reference=ref(model.get_submodule(self.name)))

    @property
    def linear(self) -> nn.Module:
        """The float module, which must still exist."""
        linear = self.reference()
        assert linear is not None, f"{self.name} was replaced, and its float module was freed"
        return linear

    @property
    def weight(self) -> Tensor:
        """The weight ``[out, in]`` in float32; a copy if the module stores another dtype."""
        return dense_weight(self.linear)

    @property
    def stored_weight(self) -> Tensor:
        """The weight ``[out, in]`` in its stored dtype, a view."""
        return stored_weight(self.linear)


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return the parameter ``weight`` of a linear or a norm, as it is stored."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def stored_weight(linear: nn.Module) -> Tensor:
    """Return the weight ``[out, in]`` of an ``nn.Linear`` or a ``Conv1D`` in its stored dtype, a view."""
    weight = weight_of(linear).detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def dense_weight(linear: nn.Module) -> Tensor:
    """Return ``stored_weight`` in float32."""
    return stored_weight(linear).float()


def linear_bias(linear: nn.Module) -> Tensor | None:
    """Return the bias ``[out]`` of a linear, or ``None`` if it has none."""
    bias = linear.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of the list of decoder blocks, and the list.

    Raises:
        InputError: there are no decoder blocks, or they have fused experts (3-D parameters).
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
    """Replace the module called ``name`` by ``layer``."""
    model.set_submodule(name, layer)


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Return all packed linears of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
