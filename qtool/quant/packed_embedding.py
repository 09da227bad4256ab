"""The packed embedding, which expands the rows of its tokens alone, and the head that reads the same table.

A model's own class of embedding may scale the rows, as Gemma's does, or shift the tokens, as OPT's does for positions.
So a packed embedding derives from that class, and stands where the class calls the forward of ``nn.Embedding``.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qtool.config.quant import QuantSpec
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.packed_weight import PARTS, PackedWeight
from qtool.system.errors import InputError


class PackedEmbedding(PackedWeight, nn.Embedding):
    """An embedding ``[rows, channels]`` whose table is held as packed codes; see ``packed_weight.py``.

    The dtype of its output is that of the buffer ``weight``.
    """

    weight: Tensor
    readers: tuple["TiedLinear", ...]
    """The heads that compute with this table; in a tuple, so that they are no submodules."""

    @classmethod
    def like(cls, module: nn.Embedding, spec: QuantSpec) -> "PackedEmbedding":
        """Return a packed embedding of zeros with the class and the attributes of ``module``, on its device."""
        own: Any = type(module)  # mypy does not take a class for hashable
        kind: type[PackedEmbedding] = _packed_class(own)
        layer = kind.__new__(kind)
        vars(layer).update(
            {key: value.copy() if isinstance(value, dict) else value for key, value in vars(module).items()}
        )
        weight = layer._parameters.pop("weight")
        assert weight is not None
        with torch.device(weight.device):
            layer.hold(module.embedding_dim, module.num_embeddings, spec)
        layer.mark(weight.dtype)
        layer.readers = ()
        return layer

    def as_float(self, weight: Tensor) -> nn.Embedding:
        """Return the embedding of the model's own class with the table ``weight`` ``[rows, channels]``."""
        own: type[nn.Embedding] = nn.Embedding if type(self) is PackedEmbedding else type(self).__bases__[0]
        layer = own.__new__(own)
        for key, value in vars(self).items():
            vars(layer)[key] = value.copy() if isinstance(value, dict) else value
        del layer.readers
        for part in PARTS:
            layer._buffers.pop(part, None)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    def changed(self) -> None:
        """Let the heads that read the table make their kernels again."""
        for head in self.readers:
            head.changed()

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the tokens ``[...]``: ``[..., channels]``."""
        return self.dequantized(self.weight.dtype, input.flatten()).view(*input.shape, self.in_features)

    def extra_repr(self) -> str:
        """Return shape and grid, for ``print(model)``."""
        return f"{self.out_features}, {self.in_features}, {self.spec.label()}"


def _derived(kind: type[nn.Embedding], base: type[nn.Embedding]) -> Any:  # Any: a class made here
    """Return the class ``kind`` with ``base`` in the place of ``nn.Embedding``."""
    return base if kind is nn.Embedding else type(f"{base.__name__}Of{kind.__name__}", (kind, base), {})


@cache
def _packed_class(kind: Any) -> Any:  # Any: classes
    """Return the class of a packed embedding for a model's class ``kind``; one for each, so that types compare."""
    return _derived(kind, PackedEmbedding)


def refuse_resizing(model: Any) -> None:  # Any: a method of transformers' models is replaced
    """Let ``model.resize_token_embeddings`` say that a packed table cannot be resized."""
    model.resize_token_embeddings = _refused


def _refused(*_: Any, **__: Any) -> None:
    raise InputError(
        "the embedding of this model is packed and cannot be resized; resize the float model, then quantize it"
    )


class _Reached(Exception):
    pass


class _Probe(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        raise _Reached


def can_stand_for(module: nn.Embedding) -> bool:
    """Return whether a packed embedding computes what ``module`` does: it calls the forward of ``nn.Embedding``."""
    kind = _derived(type(module), _Probe)
    probe = kind.__new__(kind)
    vars(probe).update(vars(module))
    try:
        probe(torch.zeros(1, 1, dtype=torch.int64))
    except _Reached:
        return module.max_norm is None  # with it, rows are changed when they are read
    except Exception:  # a class with another signature can fail in any way
        return False
    return False


class TiedLinear(PackedLinear):
    """The output head of a model that computes with its embedding: it reads the table of a ``PackedEmbedding``.

    It has no buffers of its own, so that a table is stored once.
    """

    def __init__(self, table: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        """Make the head that reads ``table``."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.spec = table.in_features, table.out_features, table.spec
        self.kernels, self.bias = (), bias
        self._table = (table,)  # in a tuple, so that it is no submodule, and is saved and moved once
        table.readers = (*table.readers, self)

    @property
    def table(self) -> PackedEmbedding:
        """The embedding whose table this layer reads."""
        return self._table[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name) if name in PARTS else super().__getattr__(name)

    def mark(self, dtype: torch.dtype) -> None:
        """Do nothing: the embedding has the dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the bias; the embedding moves the table, and lets this layer make its kernels again."""
        return nn.Module._apply(self, fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        nn.Module._load_from_state_dict(self, *args, **kwargs)
