"""The linears of a model whose class is not known, chosen by the names and shapes of its tensors.

The rule, in the order in which it is applied to a floating-point tensor ``X.weight`` with two dimensions:

1. ``quant.overrides`` decide where a pattern that matches ``X`` has the key ``skip``; the last such pattern counts.
2. ``X`` lies in a numbered block: a part of its name is a number, and something follows (``layers.3.mlp.up_proj``).
3. ``X`` matches no pattern of ``FLOAT``: embeddings, heads, norms, routers, and the towers of multimodal models.
4. It has at least ``MIN_ROWS`` rows.

What passes is quantized. All other tensors stay as they are. If more than ``FLOAT_SHARE`` of the numbered blocks would
stay so without being named by 1 or by a pattern (fused experts, for example), the model is refused.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from qtool.config.quant import QuantConfig, QuantSpec
from qtool.models.linears import FLOAT_SHARE
from qtool.models.shard_writer import Described

IN_BLOCK = re.compile(r"(^|.*\.)\d+\..+")  # pattern of a name in a numbered block
MIN_ROWS = 32  # fewest rows of a linear that is quantized: smaller ones are routers, gates and the like
# patterns of the names of linears that stay in floating point
FLOAT = (
    *("*embed*", "*wte", "*wpe", "*position*", "lm_head", "*.lm_head", "*.head", "*norm*", "*.ln_*"),
    *("*router*", "*.gate", "*.gate.*", "*_expert_gate", "*classifier*", "*score*", "*bias*"),
    *("*vision*", "*visual*", "*image*", "*video*", "*audio*", "*speech*", "*projector*", "*merger*"),
)
SUFFIX = ".weight"


@dataclass
class Chosen:
    """The linears to quantize, and the linears of numbered blocks that stay in floating point."""

    specs: dict[str, QuantSpec] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)  # (out, in) of each linear to quantize
    floats: dict[str, tuple[int, int]] = field(default_factory=dict)  # (out, in) of each that is not
    faults: list[str] = field(default_factory=list)

    def note(self) -> str:
        """Return a sentence that says what is quantized and what is not, for users."""
        lists = sorted({re.sub(r"\.\d+\..*|^\d+\..*", "", name) or "the blocks" for name in self.specs})
        text = f"model.free: {len(self.specs)} linears are quantized, in {', '.join(lists)}"
        kinds = sorted({re.sub(r"\d+", "*", name) for name in self.floats})
        if kinds:
            shown = ", ".join(kinds[:5]) + (f" and {len(kinds) - 5} more" if len(kinds) > 5 else "")
            text += f"; {len(self.floats)} stay in floating point: {shown}"
        return text


def choose(tensors: Mapping[str, Described], quant: QuantConfig) -> Chosen:
    """Return what ``quant`` quantizes of a model with these ``tensors``, and all faults that names and shapes show."""
    chosen, left = Chosen(), dict[str, int]()
    matrices = {n.removesuffix(SUFFIX): d.shape for n, d in tensors.items() if _is_matrix(n, d)}
    total = 0
    for name, described in sorted(tensors.items(), key=lambda item: _in_order(item[0])):
        linear, size = name.removesuffix(SUFFIX), math.prod(described.shape)
        decided = _decided(quant, linear)
        by_pattern = any(fnmatchcase(linear, pattern) for pattern in FLOAT)
        in_block = IN_BLOCK.fullmatch(linear) is not None
        if linear in matrices and name.endswith(SUFFIX):
            rows, columns = matrices[linear]
            wanted = in_block and not by_pattern and rows >= MIN_ROWS if decided is None else not decided
            if wanted and (spec := quant.spec_for(linear)) is not None:
                chosen.specs[linear], chosen.shapes[linear] = spec, (rows, columns)
                bias = tensors.get(f"{linear}.bias")
                if bias is not None and bias.shape != (rows,):
                    chosen.faults.append(
                        f"{name} is {rows} x {columns} and its bias has {math.prod(bias.shape)} numbers: it is stored "
                        "as [in, out], which only the model's class can say for all linears; run without model.free"
                    )
            elif in_block:
                chosen.floats[linear] = (rows, columns)
        counts = in_block and not by_pattern and described.dtype.is_floating_point
        total += size if counts else 0
        if counts and linear not in chosen.specs and decided is None and _is_large(described):
            left[linear] = size
    chosen.faults += _too_much_left(left, total)
    chosen.faults += _unmatched(quant, [*matrices, *left])
    if not chosen.specs and not chosen.faults:
        chosen.faults.append("no tensor is a linear of a numbered block by its name; nothing is left to quantize")
    return chosen


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names with their numbers as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _is_matrix(name: str, described: Described) -> bool:
    return name.endswith(SUFFIX) and len(described.shape) == 2 and described.dtype.is_floating_point


def _is_large(described: Described) -> bool:
    """Return whether a tensor could be the weights of linears: no vector, and no kernel of a convolution."""
    return len(described.shape) > 1 and min(described.shape[-2:]) >= MIN_ROWS


def _decided(quant: QuantConfig, linear: str) -> bool | None:
    """Return the ``skip`` that the overrides give for a linear; ``None`` if none of them gives it."""
    found = None
    for pattern, override in quant.overrides.items():
        if "skip" in override.model_fields_set and fnmatchcase(linear, pattern):
            found = override.skip
    return found


def _too_much_left(left: Mapping[str, int], total: int) -> Iterator[str]:
    if sum(left.values()) > FLOAT_SHARE * total:
        largest = max(left, key=lambda name: left[name])
        yield (
            f"{sum(left.values()) / total:.0%} of the blocks' weights are in tensors that names and shapes do not show "
            f"to be linears, e.g. {largest}; run without model.free, or let them stay in floating point by "
            f"quant.overrides: {{'{re.sub(r'[0-9]+', '*', largest)}': {{skip: true}}}}"
        )


def _unmatched(quant: QuantConfig, names: list[str]) -> Iterator[str]:
    """Yield a fault for each override whose pattern matches no name."""
    for pattern in quant.overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=1, cutoff=0.0)
            shown = f"; the nearest of {len(names)} names is {near[0]}" if near else ""
            yield f"quant.overrides: no linear matches '{pattern}'{shown}"
