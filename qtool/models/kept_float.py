"""The weights of decoder blocks that stay in floating point unless a recipe says otherwise, and what is said of them.

* Small linears: fewer than ``MIN_ROWS`` rows. They are gates of one number for each head or expert; a grid saves
  nothing there, and formats need multiples of 32.
* Routers: as many rows as there are experts beside them. A rounded router sends tokens to other experts.
* Linears that a packed layer cannot stand for (``uncalled.py``).

An override ``skip: false`` quantizes the linears of the first two kinds that it matches.

Matrices that are no linears' weights stay in floating point too. More than ``FLOAT_SHARE`` of the blocks' weights in
them, or in linears of the third kind, is refused, unless overrides with ``skip: true`` match them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

MIN_ROWS = 32  # a linear with fewer rows, or a matrix that has fewer numbers for each row or column, is small
FLOAT_SHARE = 0.05  # largest share of the blocks' weights that may stay in floating point without being asked for
SHOWN = 6  # most names in a line

SMALL = f"linears of fewer than {MIN_ROWS} rows"
ROUTER = "routers (linears with one row for each expert)"

Blocks = Sequence[tuple[str, nn.Module]]


def small_and_routers(blocks: Blocks) -> dict[str, str]:
    """Return the linears that stay in floating point by default: full name -> ``SMALL`` or ``ROUTER``."""
    found: dict[str, str] = {}
    for block_name, block in blocks:
        experts = list(_experts(block))
        for name, module in block.named_modules():
            if not isinstance(module, nn.Linear | Conv1D) or hasattr(module, "experts"):
                continue
            rows = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
            if any(rows == count and name.startswith(beside) for beside, count in experts):
                found[f"{block_name}.{name}"] = ROUTER
            elif rows < MIN_ROWS:
                found[f"{block_name}.{name}"] = SMALL
    return found


def _experts(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the number of experts of each mixture in a block, with the prefix of the names beside the experts."""
    for name, module in block.named_modules():
        count = getattr(module, "experts", None)  # of a linear that holds all experts
        if isinstance(count, int):
            counts, name = {count}, name.rpartition(".")[0]
        elif "Experts" in type(module).__name__:
            counts = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3}
        else:
            continue
        beside = name.rpartition(".")[0]
        for each in counts:
            yield f"{beside}." if beside else "", each


def other_matrices(blocks: Blocks) -> dict[str, nn.Parameter]:
    """Return the parameters of blocks that are matrices of no linear, by full name.

    Kernels of convolutions, embeddings, vectors such as ``[1, 1, d]``, and matrices of fewer than ``MIN_ROWS`` numbers
    for each channel are not among them.
    """
    return {
        f"{block_name}.{name}.{key}" if name else f"{block_name}.{key}": parameter
        for block_name, block in blocks
        for name, module in block.named_modules()
        if not isinstance(module, nn.Linear | Conv1D | _ConvNd | nn.Embedding)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.numel() >= MIN_ROWS * max(parameter.shape)
    }


def share(parts: Iterable[Tensor], blocks: Blocks) -> float:
    """Return the share of the blocks' weights that ``parts`` are."""
    total = {id(p): p.numel() for _, block in blocks for p in block.parameters()}
    return sum(part.numel() for part in parts) / max(1, sum(total.values()))


def short(names: Iterable[str]) -> str:
    """Return names for a line: those that differ only in the numbers of blocks once, the first ``SHOWN`` of them."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    more = f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else ""
    return ", ".join(kinds[:SHOWN]) + more


def notes(kept: Mapping[str, str], matrices: Mapping[str, nn.Parameter], blocks: Blocks) -> Iterator[str]:
    """Yield a line for each kind of linear in ``kept`` (name -> kind), and one for ``matrices`` of no linear."""
    for kind in dict.fromkeys(kept.values()):
        names = [name for name, each in kept.items() if each == kind]
        what = kind if kind in (SMALL, ROUTER) else f"linears that a packed layer cannot stand for ({kind})"
        how = "; quant.overrides with skip: false quantizes them" if kind in (SMALL, ROUTER) else ""
        yield f"{what} stay in floating point: {short(names)}{how}"
    if matrices:
        yield (
            f"{100 * share(matrices.values(), blocks):.2g} % of the blocks' weights are in no linear and stay in "
            f"floating point: {short(matrices)}"
        )
