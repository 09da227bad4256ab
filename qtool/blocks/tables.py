"""Quantizing the tables of a model: embeddings before the first block, and the head after the last.

A row of an embedding is read alone, so its range is searched alone, without text (``quant/ranges.py``). The rows of a
head are multiplied by the same input, the output of the final norm. A method quantizes them as the linear of one more
block, which reads few rows with the same second moment as the inputs of all tokens.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from qtool.blocks.job import Job
from qtool.models.linears import Target
from qtool.models.tables import put_packed
from qtool.quant.affine import QuantizedWeight, quantize, relative_error
from qtool.quant.packed_embedding import PackedEmbedding
from qtool.quant.ranges import search_qparams
from qtool.system import distributed, memory, progress
from qtool.system.seeds import derived_seed

ROWS_AT_ONCE = 1 << 22  # number of weights whose ranges are searched together
NUM_WINDOWS, WINDOWS_PER_BATCH = 32, 4  # windows and batches that the input of a head is put into


@torch.no_grad()
def pack_embeddings(job: Job) -> Job:
    """Replace the embeddings of a job by packed ones, and tied heads by layers that read them.

    Return the job with the float modules in ``tables.floats``.
    """
    loaded, layers, errors = job.loaded, {}, {}
    for target in progress.track(job.tables.embeddings, "quantizing embeddings", len(job.tables.embeddings)):
        module = target.linear
        assert isinstance(module, nn.Embedding)
        layer = PackedEmbedding.like(module, target.spec)  # where the model is: a streamed one is on the CPU
        quantized = nearest(target, loaded.device)
        errors[target.name] = relative_error(target.stored_weight.to(loaded.device), quantized)
        if loaded.streaming:
            memory.Pages().drop(target.stored_weight)
        codes, scale, zero_point = (part.to(layer.weight.device) for part in quantized[:3])
        layer.fill(QuantizedWeight(codes, scale, zero_point, target.spec))
        layer.mark(loaded.dtype)
        layers[target.name] = layer
    replaced = put_packed(loaded.model, job.tables, layers)
    return replace(job, tables=replace(job.tables, floats=replaced, errors=errors))


def nearest(target: Target, device: torch.device) -> QuantizedWeight:
    """Return a table rounded to nearest in searched ranges, some rows at a time."""
    parts, stored = [], target.stored_weight
    for rows in stored.split(max(1, ROWS_AT_ONCE // stored.shape[1])):
        weight = rows.to(device, torch.float32)
        grid = search_qparams(weight, target.spec)
        parts.append((quantize(weight, *grid, target.spec), *grid))
    codes, scale, zero_point = (torch.cat(each) for each in zip(*parts, strict=True))
    return QuantizedWeight(codes, scale, zero_point, target.spec)


class HeadBlock(nn.Module):
    """The block after the last one: it maps the output of the final norm ``[b, t, d]`` to logits by the head alone."""

    def __init__(self, leaf: str, head: nn.Module) -> None:
        """Hold ``head`` under its own name ``leaf``."""
        super().__init__()
        self.leaf = leaf
        self.add_module(leaf, head)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[b, t, vocabulary]``."""
        logits: Tensor = self.get_submodule(self.leaf)(hidden)
        return logits


def same_moment(inputs: Iterator[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    """Return inputs of few rows with the same mean ``x^T x`` as those of all tokens, in batches of windows.

    ``inputs`` yields a batch ``[tokens, d]`` of each of several inputs of the same tokens, such as those of the
    quantized and of the float model; the moments between them are kept too. The result has the batches ``[w, t, d]`` of
    each. The squared error of a linear is the same on them up to a factor. The rows are a random mixture, so that each
    batch stands for all tokens.
    """
    moment, count, sizes = None, 0, []
    for parts in inputs:
        joined = torch.cat(parts, 1).double()
        sizes = [part.shape[1] for part in parts]
        moment = joined.T @ joined if moment is None else moment.addmm_(joined.T, joined)
        count += len(joined)
    assert moment is not None, "a head without inputs"
    mean = moment / count
    distributed.pool(count, mean)  # several processes, each with its own batches, get the same rows
    values, vectors = torch.linalg.eigh(mean)
    rows = -(-len(values) // NUM_WINDOWS) * NUM_WINDOWS
    generator = torch.Generator().manual_seed(derived_seed(0, len(values)))
    mixture, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    root = vectors * values.clamp(min=0).sqrt() * rows**0.5
    made = (mixture.to(root) @ root.T).float()
    return [
        list(part.contiguous().view(NUM_WINDOWS, -1, part.shape[1]).split(WINDOWS_PER_BATCH))
        for part in made.split(sizes, 1)
    ]
