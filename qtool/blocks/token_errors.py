"""The squared error of hidden states, of each token relative to the size of its own state.

The norms that read a state divide it by its size, so an error of a tenth costs the model much the same whatever that
size is; and models have tokens, the first of a window above all, whose squares are ten thousand times those of others
("massive activations", arXiv 2402.17762), which would be all that a sum of plain squares sees.
"""

import torch
from torch import Tensor

TINY = 1e-6  # smallest mean square of a token, as a share of that of all: a state of zeros has no relative error


def relative_squares(found: Tensor, expected: Tensor, mean_square: float | None = None) -> Tensor:
    """Return ``(found - expected)**2`` ``[..., d]``, a token as a share of its own mean of ``expected**2``, in float32.

    Its mean is the mean over tokens of ``|found - expected|**2 / |expected|**2``. ``mean_square`` is that of all tokens
    from which ``expected`` comes; unset: of ``expected`` itself.
    """
    expected = expected.float()
    size = expected.square().mean(-1, keepdim=True)
    floor = TINY * (float(size.mean()) if mean_square is None else mean_square)
    # a product with what has no gradient saves one number a token for the backward pass, and not the difference
    share = size.clamp_min(max(floor, torch.finfo(torch.float32).tiny)).rsqrt()
    return ((found.float() - expected) * share).square()
