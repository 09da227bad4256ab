"""Second moments of the inputs of linears, for GPTQ and GPTAQ.

The output error of a weight change ``d`` is ``d H d^T`` with ``H = 2/n sum x x^T`` over tokens, so a token with larger
inputs counts more. Norms divide by the size of a token's state, so what an error costs depends on its size relative to
the token's: with ``relative`` weights tokens count alike, whatever their size.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qtool.blocks.stages import Stage
from qtool.blocks.task import Rows
from qtool.quant.hessian import add_gram, even_scale, grams, mirror, row_chunks
from qtool.system import distributed
from qtool.system.matmul import exact_products

TokenWeights = Literal["relative", "plain"]


class Statistics(NamedTuple):
    """Second moments, over the calibration text, of an input of ``in`` channels that some linears share."""

    hessian: Tensor  # [in, in] float32, 2/n sum x x^T
    drift: Tensor | None  # [in, in] float32, 2/n sum (x_float - x) x^T


def weighed(x: Tensor, token_weights: TokenWeights) -> Tensor:
    """Return the inputs ``x`` ``[tokens, in]`` as they count in sums."""
    return x * even_scale(x) if token_weights == "relative" else x


def moment(inputs: Iterable[Rows], token_weights: TokenWeights) -> Tensor:
    """Return ``2/n sum x x^T`` ``[in, in]`` of the inputs of all processes."""
    ((found, count),) = grams([weighed(rows.x, token_weights)] for rows in inputs)
    distributed.pool(count, found)
    return found


def collect(stage: Stage, token_weights: TokenWeights = "plain") -> Statistics:
    """Return the statistics of the input that the linears of ``stage`` share, over the text of all processes.

    A token's input in the float model is scaled as its input in the quantized one.
    """
    if stage.float_inputs is None:
        return Statistics(moment(stage.inputs, token_weights), None)
    hessian = drift = None
    count = 0
    for (batch, _), (batch_float, _) in zip(stage.inputs, stage.float_inputs, strict=True):
        count, size = count + len(batch), batch.shape[1]
        if hessian is None or drift is None:
            hessian = batch.new_zeros(size, size, dtype=torch.float32)
            drift = torch.zeros_like(hessian)
        scale = even_scale(batch) if token_weights == "relative" else batch.new_ones(len(batch), 1)
        for rows in row_chunks(batch):
            x = (batch[rows] * scale[rows]).float()
            with exact_products(batch.dtype):
                add_gram(hessian, x)
            drift.addmm_(((batch_float[rows] * scale[rows]).float() - x).T, x)
            del x  # frees its memory before the next chunk is cast
    assert hessian is not None, "statistics need a batch"
    assert drift is not None
    mirror(hessian.mul_(2 / count))
    drift.mul_(2 / count)
    distributed.pool(count, hessian, drift)
    return Statistics(hessian, drift)
