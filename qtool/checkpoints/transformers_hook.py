"""The hook into transformers: after ``import qtool``, ``from_pretrained`` loads native checkpoints with packed weights.

Only the stable part of transformers' quantizer interface is defined, so that this file works with every supported 5.x.
"""

import re
from collections.abc import Container
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qtool.checkpoints.quantization_config import specs_of, tables_of
from qtool.models import experts
from qtool.quant.packed_embedding import PackedEmbedding, TiedLinear, refuse_resizing
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.packed_weight import PackedWeight
from qtool.system.errors import InputError


@register_quantization_config("qtool")
class QtoolConfig(QuantizationConfigMixin):
    """The ``quantization_config`` section of a native checkpoint, unchanged."""

    def __init__(self, **section: Any) -> None:
        """Check and keep ``section``, before any tensor is read."""
        section.setdefault("quant_method", "qtool")
        self.specs = specs_of(section)
        self.section = section
        self.quant_method: Any = "qtool"  # the mixin wants its own enum, and compares by value

    def to_dict(self) -> dict[str, Any]:
        """Return the section, for ``config.json``."""
        return dict(self.section)


@register_quantizer("qtool")
class QtoolQuantizer(HfQuantizer):
    """Replaces the listed linears and embeddings by packed layers before the weights are loaded."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Accept every environment: nothing beyond torch is needed."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        assert isinstance(self.quantization_config, QtoolConfig)
        experts.unfuse(model)
        linears = dict(model.named_modules())
        tables = tables_of(self.quantization_config.section)
        for full_name in tables.embeddings:
            self._put_embedding(model, full_name, linears)
        for full_name, spec in self.quantization_config.specs.items():
            if full_name in tables.embeddings:
                continue
            name = _name_within(model, full_name, linears)
            linear: Any = linears.get(name)
            if linear is None and model.get_output_embeddings() is None and not _in_block(full_name):
                continue  # the head, which AutoModel does not have
            weight = getattr(linear, "weight", None)
            if not hasattr(linear, "bias") or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
                raise InputError(f"quantization_config lists {full_name}, which is no linear of {type(model).__name__}")
            shape = weight.shape
            out_features, in_features = shape if isinstance(linear, nn.Linear) else shape[::-1]  # Conv1D: transposed
            bias = linear.bias.dtype if isinstance(linear.bias, nn.Parameter) else None
            with torch.device("meta"):
                model.set_submodule(name, PackedLinear(in_features, out_features, spec, bias))

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Leave out conversions of the weights that are packed: files hold them in the form that they have in memory.

        A conversion of this kind drops the rows of a head that fill up the vocabulary.
        """
        packed = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, PackedWeight)]
        return [
            each
            for each in weight_conversions
            if not hasattr(each, "operations")  # a renaming
            or not any(re.search(pattern, name) for pattern in each.source_patterns for name in packed)
        ]

    def _put_embedding(self, model: PreTrainedModel, full_name: str, modules: dict[str, nn.Module]) -> None:
        """Replace an embedding by a packed one, and the heads that are tied to it by layers that read it."""
        assert isinstance(self.quantization_config, QtoolConfig)
        name = _name_within(model, full_name, modules)
        module = modules.get(name)
        if not isinstance(module, nn.Embedding):
            raise InputError(f"quantization_config lists {full_name}, which is no embedding of {type(model).__name__}")
        with torch.device("meta"):
            layer = PackedEmbedding.like(module, self.quantization_config.specs[full_name])
        model.set_submodule(name, layer)
        refuse_resizing(model)
        for head, table in tables_of(self.quantization_config.section).tied.items():
            own = _name_within(model, head, modules)
            if table == full_name and own in modules:  # AutoModel has no head
                bias = getattr(modules[own], "bias", None)
                model.set_submodule(own, TiedLinear(layer, bias if isinstance(bias, nn.Parameter) else None))
                model.all_tied_weights_keys.pop(f"{own}.weight", None)  # there is no second table to tie

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Refuse tensors that do not fit their grid: older transformers do not compare shapes for a quantized model."""
        for name, module in model.named_modules():
            if isinstance(module, TiedLinear):
                continue
            if isinstance(module, PackedWeight):
                module.check(name)
                module.mark(model.dtype)  # files hold a byte
            elif isinstance(module, nn.Linear) and module.weight.dim() != 2:
                raise InputError(
                    f"{name} is packed in the files, and quantization_config does not list it; config.json is damaged"
                )

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return true: ``save_pretrained`` writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: packed codes do not train."""
        return False


def _in_block(name: str) -> bool:
    """Return whether the module called ``name`` is in a decoder block, whose number its name then has."""
    return any(part.isdigit() for part in name.split("."))


def _name_within(model: PreTrainedModel, name: str, modules: Container[str]) -> str:
    """Return the name in ``model``, which may be a part of the whole, of the module called ``name`` in the whole.

    ``AutoModel`` has no head, so that its names lack the prefix of the body, and ``AutoModelForCausalLM`` loads of some
    multimodal models the language model alone, whose names lack a part in the middle.
    """
    parts = name.split(".")
    block = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))  # a table is in no block
    prefixes = ("", *(child for child, _ in model.named_children()))
    places = [".".join(filter(None, (prefix, *parts[skip:]))) for skip in range(block) for prefix in prefixes]
    return next((place for place in places if place in modules), name)
