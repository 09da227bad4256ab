"""Decoder blocks and linears in a module tree: finding, reading and replacing them.

Nothing is known of any architecture. The decoder blocks are the ``ModuleList`` within the text decoder that holds the
most linears and lies in no other list; the linears are all ``nn.Linear`` and ``Conv1D`` inside. ``Conv1D`` is the
linear of GPT-2, which stores its weight as ``[in, out]``; here a weight is always ``[out, in]``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qtool.config.quant import QuantSpec
from qtool.quant.packed_embedding import TiedLinear
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.packed_weight import PackedWeight
from qtool.quant.trained_linear import QuantLinear
from qtool.system.errors import InputError

LINEARS = (nn.Linear, Conv1D, PackedLinear, QuantLinear)  # classes of a linear, before and after it is replaced


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


def linear_shapes(blocks: Iterable[tuple[str, nn.Module]]) -> dict[str, tuple[int, int]]:
    """Return ``(out, in)`` of each linear of decoder blocks, float or packed, by full name, in module order."""
    found = {}
    for block_name, block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, PackedLinear):
                found[f"{block_name}.{name}"] = (module.out_features, module.in_features)
            elif isinstance(module, nn.Linear | Conv1D):
                rows, columns = stored_weight(module).shape
                found[f"{block_name}.{name}"] = (rows, columns)
    return found


def dense_weight(linear: nn.Module) -> Tensor:
    """Return ``stored_weight`` in float32."""
    return stored_weight(linear).float()


def linear_bias(linear: nn.Module) -> Tensor | None:
    """Return the bias ``[out]`` of a linear, or ``None`` if it has none."""
    bias = linear.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of the list of decoder blocks, and the list; the same before and after linears are packed.

    Raises:
        InputError: there are no decoder blocks, or there are two stacks of them.
    """
    lists = _block_lists(*text_decoder(model)) or _block_lists("", model)
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers; it is not supported"
        )
    name = max(lists, key=lambda name: sum(isinstance(part, LINEARS) for part in lists[name].modules()))
    blocks = lists.pop(name)
    kinds = {type(block) for block in blocks}
    for other, each in lists.items():
        if kinds & {type(block) for block in each}:
            raise InputError(
                f"{type(model).__name__} has two stacks of decoder blocks ({name}, {other}); only models with one are "
                "supported"
            )
    return name, blocks


def text_decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the module of the text decoder: of a multimodal model the language model, not a tower."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    # a model may call its output head "decoder", which get_decoder finds by this name
    names = [name for name, module in model.named_modules() if module is decoder and not isinstance(module, LINEARS)]
    return (names[0], model.get_submodule(names[0])) if names else ("", model)


def beside_decoder(model: nn.Module) -> list[nn.Module]:
    """Return the modules beside the text decoder of a multimodal model: towers, and what projects from them."""
    path, _ = text_decoder(model)
    parts = path.split(".") if path else []
    above = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts))]
    way = {*above, *([model.get_submodule(path)] if path else [])}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        child
        for module in above
        for child in module.children()
        if child not in way and child is not head and not isinstance(child, nn.Embedding)
    ]


def _block_lists(prefix: str, decoder: nn.Module) -> dict[str, nn.ModuleList]:
    """Return each list of modules with linears inside that lies in no other such list, by its name."""
    lists = {
        name: module
        for name, module in decoder.named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList)
        and not any(isinstance(block, LINEARS) for block in module)
        and any(isinstance(part, LINEARS) for part in module.modules())
    }
    return {name: each for name, each in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}


def replace_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the linear called ``name`` by ``layer``."""
    if isinstance(layer, PackedLinear):
        dtype = model.get_submodule(name).weight.dtype
        assert isinstance(dtype, torch.dtype)
        layer.mark(dtype)
    model.set_submodule(name, layer)


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Return the packed linears of ``model`` by name, without a head that reads the embedding's table."""
    return {name: module for name, module in packed_weights(model).items() if isinstance(module, PackedLinear)}


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Return the layers of ``model`` that hold a packed weight, linears and embeddings, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight) and not isinstance(module, TiedLinear)
    }
