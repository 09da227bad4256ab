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
from qtool.models import kept_float
from qtool.models.kept_float import FLOAT_SHARE, other_matrices, share, short, small_and_routers
from qtool.models.kv_cache import with_heads
from qtool.models.linears import Target, stored_weight, weight_of
from qtool.models.loaded import LoadedModel
from qtool.models.tables import table_keys
from qtool.models.uncalled import no_plain_linears
from qtool.quant.affine import check_weight
from qtool.system import memory, progress
from qtool.system.errors import InputError, listing


def select_targets(loaded: LoadedModel, quant: QuantConfig) -> tuple[Target, ...]:
    """Return the linears of the decoder blocks that ``quant`` quantizes, in module order, with their grids.

    Small linears, routers, and linears that a packed layer cannot stand for stay in floating point (``kept_float.py``);
    a note says so. A weight whose extremes are known from loading is not read again.

    Raises:
        InputError: with all faults: an override that matches no linear, a group size that does not divide the channels,
            values that are not finite, a scale that its dtype cannot hold, keys or values that cannot be rounded, or
            more of the blocks that would stay in floating point than was asked for.
    """
    linears = {
        f"{block_name}.{name}": (module, index)
        for index, (block_name, block) in enumerate(loaded.blocks())
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    kept, notes, faults = _kept(loaded, quant, list(linears))
    targets, pages = [], memory.Pages()
    for name, (module, index) in linears.items():
        spec = quant.spec_for(name)
        if spec is None or name in kept:
            continue
        try:
            check_weight(stored_weight(module), spec, f"{name}.weight", loaded.extremes.get(f"{name}.weight"))
        except InputError as error:
            faults.append(str(error))
        if loaded.streaming:  # other weights may have been changed in memory, and are not in their files then
            pages.drop(weight_of(module))
        targets.append(Target.of(name, module, spec, index))
    faults += _shared(loaded, {target.name for target in targets})
    if any(target.spec.kv_cache is not None for target in targets):
        asked = {target.name: target.spec for target in targets}
        specs, wrong = with_heads(asked, {t.name: t.weight_shape[0] for t in targets}, loaded.model.config)
        targets = [replace(target, spec=specs[target.name]) for target in targets]
        faults += wrong
    if not targets and not faults:
        others = f" but {short(kept)}, which stay in floating point by default" if kept else ""
        faults.append(f"quant.overrides skip every linear{others}; nothing is left to quantize")
    if faults:
        raise InputError(listing(f"{loaded.path} cannot be quantized with this recipe:", shortened(faults)))
    for line in notes:
        if line not in loaded.notes:
            progress.note(line)
            loaded.notes.append(line)
    return tuple(targets)


def _kept(loaded: LoadedModel, quant: QuantConfig, names: list[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Return the linears that stay in floating point without being asked for (name -> why), notes, and faults."""
    blocks = loaded.blocks()
    matrices = other_matrices(blocks)
    faults = list(_unmatched(quant, names, list(matrices), table_keys(loaded.model)))
    if loaded.odd_linears is None:
        loaded.odd_linears = no_plain_linears(loaded.model, blocks)
        if loaded.streaming:
            memory.Pages().drop(*(parameter for _, block in blocks for parameter in block.parameters()))
    odd, skipped = loaded.odd_linears, {name: quant.skips(name) for name in (*names, *matrices)}
    faults += [
        f"{name} cannot be quantized: of such linears, {why}; leave out skip: false for it in quant.overrides"
        for name, why in odd.items()
        if skipped[name] is False
    ]
    found = odd | {name: why for name, why in small_and_routers(blocks).items() if name not in odd}
    kept = {name: why for name, why in found.items() if skipped[name] is None}
    weights = matrices | {name: weight_of(loaded.model.get_submodule(name)) for name in odd}
    silent = {name: weight for name, weight in weights.items() if not skipped[name]}
    if (part := share(silent.values(), blocks)) > FLOAT_SHARE:
        largest = max(silent, key=lambda name: silent[name].numel())
        faults.append(
            f"{100 * part:.0f} % of the blocks' weights would stay in floating point, because they are in no linear "
            f"that can be quantized: {short(silent)}; to accept that, name them with skip: true in quant.overrides, "
            f"for example {{'*.{'.'.join(largest.split('.')[-2:])}': {{skip: true}}}}"
        )
    return kept, list(kept_float.notes(kept, matrices, blocks)), faults


def _shared(loaded: LoadedModel, names: set[str]) -> Iterator[str]:
    """Yield a fault for each linear in ``names`` whose weight several blocks share."""
    seen = dict[int, str]()
    for block_name, block in loaded.blocks():
        for part, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                name = f"{block_name}.{part}"
                first = seen.setdefault(id(weight_of(module)), name)
                if first != name and {name, first} & names:
                    yield f"{name} has the same weight as {first}; blocks that share weights are not supported"


def shortened(faults: list[str]) -> Iterator[str]:
    """Yield one of the faults that differ only in numbers, with the count of the others.

    Of group sizes that do not divide, one for each number of input channels, whatever the linears are called.
    """
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        _, _, rest = fault.partition(" has ")
        kind = rest if "group_size" in rest else re.sub(r"\d+", "0", fault)
        kinds.setdefault(kind, []).append(fault)
    for same in kinds.values():
        yield same[0] + (f" (and {len(same) - 1} more like it)" if len(same) > 1 else "")


def _unmatched(quant: QuantConfig, names: list[str], matrices: list[str], tables: dict[str, str]) -> Iterator[str]:
    """Yield a fault for each override whose pattern matches no linear, and with ``skip: true`` no matrix either."""
    for pattern, override in quant.overrides.items():
        if any(fnmatchcase(name, pattern) for name in (*names, *(matrices if override.skip else ()))):
            continue
        table = next((name for name in tables if fnmatchcase(name, pattern)), None)
        if table is not None:
            yield (
                f"quant.overrides: '{pattern}' is {table}, which is in no decoder block; its grid is "
                f"{tables[table]}, a grid such as {{num_bits: 8}}, or float"
            )
            continue
        near = get_close_matches(pattern, names, n=1, cutoff=0.0)
        yield f"quant.overrides: no linear matches '{pattern}'; the nearest of {len(names)} names is {near[0]}"
