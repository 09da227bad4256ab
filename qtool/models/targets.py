"""The linears of a model that a recipe quantizes, each with its grid: selected and checked once per run.

All faults are reported together, and faults that differ only in the numbers of blocks are reported once.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from qtool.config.quant import QuantConfig
from qtool.models.kv_cache import with_heads
from qtool.models.linears import Target, stored_weight, weight_of
from qtool.models.loaded import LoadedModel
from qtool.models.uncalled import has_other_weights, no_plain_linears
from qtool.quant.affine import check_weight
from qtool.system import memory
from qtool.system.errors import InputError, listing


def select_targets(loaded: LoadedModel, quant: QuantConfig) -> tuple[Target, ...]:
    """Return the linears of the decoder blocks that ``quant`` does not skip, in module order, with their grids.

    A weight whose extremes are known from loading is not read again.

    Raises:
        InputError: with all faults: an override that matches no linear, a group size that does not divide the channels,
            values that are not finite, a scale that its dtype cannot hold, keys or values that cannot be rounded.
    """
    linears = [
        (f"{block_name}.{name}", module, index)
        for index, (block_name, block) in enumerate(loaded.blocks())
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    names = [name for name, _, _ in linears]
    faults = list(_unmatched(quant, names))
    targets, pages = [], memory.Pages()
    for name, module, index in linears:
        spec = quant.spec_for(name)
        if spec is None:
            continue
        try:
            check_weight(stored_weight(module), spec, f"{name}.weight", loaded.extremes.get(f"{name}.weight"))
        except InputError as error:
            faults.append(str(error))
        pages.drop(weight_of(module))
        targets.append(Target.of(name, module, spec, index))
    faults += _no_plain(loaded, {target.name for target in targets})
    if any(target.spec.kv_cache is not None for target in targets):
        asked = {target.name: target.spec for target in targets}
        specs, wrong = with_heads(asked, {t.name: t.weight_shape[0] for t in targets}, loaded.model.config)
        targets = [replace(target, spec=specs[target.name]) for target in targets]
        faults += wrong
    if not targets and not faults:
        faults.append("quant.overrides skip every linear; nothing is left to quantize")
    if faults:
        raise InputError(listing(f"{loaded.path} cannot be quantized with this recipe:", shortened(faults)))
    return tuple(targets)


def _no_plain(loaded: LoadedModel, names: set[str]) -> Iterator[str]:
    """Yield a fault for each linear in ``names`` that several blocks share, or that a packed layer cannot stand for."""
    blocks, seen = loaded.blocks(), dict[nn.Module, str]()
    for block_name, block in blocks:
        for part, module in block.named_modules():
            name = f"{block_name}.{part}"
            shared = isinstance(module, nn.Linear | Conv1D) and seen.setdefault(module, name) != name
            if shared and {name, seen[module]} & names:
                yield f"{name} is the same linear as {seen[module]}; blocks that share weights are not supported"
    if any(has_other_weights(block) for _, block in blocks):
        for name in sorted(names & no_plain_linears(loaded.model, blocks)):
            pattern = f"*.{name.rpartition('.')[2]}"
            yield (
                f"{name} is not called as a linear: the model's own code reads its weight; leave it in floating point "
                f"by quant.overrides: {{'{pattern}': {{skip: true}}}}"
            )


def shortened(faults: list[str]) -> Iterator[str]:
    """Yield one of the faults that differ only in numbers, with the count of the others."""
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(re.sub(r"\d+", "0", fault), []).append(fault)
    for same in kinds.values():
        yield same[0] + (f" (and {len(same) - 1} more like it)" if len(same) > 1 else "")


def _unmatched(quant: QuantConfig, names: list[str]) -> Iterator[str]:
    """Yield a fault for each override whose pattern matches no linear."""
    for pattern in quant.overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=1, cutoff=0.0)
            yield f"quant.overrides: no linear matches '{pattern}'; the nearest of {len(names)} names is {near[0]}"
