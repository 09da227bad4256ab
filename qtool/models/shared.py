"""Two models that hold equal tensors once: a quantized model and the float model beside it in an evaluation."""

import torch
from torch import Tensor, nn

from qtool.models.loaded import LoadedModel


@torch.no_grad()
def share_equal(loaded: LoadedModel, other: LoadedModel) -> LoadedModel:
    """Let ``other`` use the tensors of ``loaded`` that have the same name, dtype, device and bits; return ``other``.

    These are embeddings, norms, biases and linears that were not quantized. Afterwards a change in place of such a
    tensor would change both models.
    """
    ours = _tensors(loaded.model)
    for name, tensor in _tensors(other.model).items():
        mine = ours.get(name)
        if mine is not None and _equal(mine, tensor):
            tensor.data = mine.data
    return other


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same form, device and bits."""
    if (first.shape, first.dtype, first.device) != (second.shape, second.dtype, second.device) or not first.dim():
        return False
    if not (first.is_contiguous() and second.is_contiguous()):
        return False
    return torch.equal(first.detach().view(torch.uint8), second.detach().view(torch.uint8))
