"""The linears of a model whose class is not known, chosen by the names and shapes of its tensors.

A linear ``X`` is a floating-point tensor ``X.weight`` with two dimensions, or the experts of a layer in one tensor
``X`` with three. The rule, in the order in which it is applied:

1. ``quant.overrides`` decide where a pattern that matches ``X`` has the key ``skip``; the last such pattern counts.
2. ``X`` lies in a numbered block: a part of its name is a number, and something follows (``layers.3.mlp.up_proj``).
3. ``X`` matches no pattern of ``FLOAT``: embeddings, heads, norms, routers, and the towers of multimodal models.
4. It has at least ``MIN_ROWS`` rows.

What passes is quantized. All other tensors stay as they are. If more than ``FLOAT_SHARE`` of the numbered blocks would
stay so without being named by 1 or by a pattern, the model is refused.

Experts are ``[experts, out, in]`` or ``[experts, in, out]``. Which it is follows from the model's hidden size, which is
the ``out`` of projections called ``down`` and the ``in`` of all others; where both or neither fit, they are no linear.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor

from qtool.config.quant import QuantConfig, QuantSpec
from qtool.models.experts import FUSED
from qtool.models.kept_float import FLOAT_SHARE
from qtool.models.shard_writer import Described

IN_BLOCK = re.compile(r"(^|.*\.)\d+\..+")  # pattern of a name in a numbered block
MIN_ROWS = 32  # fewest rows of a linear that is quantized: smaller ones are routers, gates and the like
EMBEDDINGS = ("*embed*", "*wte", "*wpe", "*position*")  # patterns of the names of embeddings
HEADS = ("lm_head", "*.lm_head", "*.head")  # patterns of the names of output heads
# patterns of the names of what reads pictures or sound
TOWERS = ("*vision*", "*visual*", "*image*", "*video*", "*audio*", "*speech*", "*projector*", "*merger*")
# patterns of the names of linears that stay in floating point
FLOAT = (
    *(*EMBEDDINGS, *HEADS, "*norm*", "*.ln_*"),
    *("*router*", "*.gate", "*.gate.*", "*_expert_gate", "*classifier*", "*score*", "*bias*"),
    *TOWERS,
)
SUFFIX = ".weight"


class Layout(NamedTuple):
    """How a tensor holds the weight of a linear, or of ``experts`` linears of one shape."""

    rows: int  # of all experts
    columns: int
    experts: int = 1
    transposed: bool = False  # [experts, in, out]

    def matrices(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the weight ``[out, in]`` of each expert, a view."""
        if tensor.dim() == 2:
            yield tensor
        else:
            yield from tensor.transpose(1, 2) if self.transposed else tensor


@dataclass
class Chosen:
    """The linears to quantize, and the linears of numbered blocks that stay in floating point."""

    specs: dict[str, QuantSpec] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)  # of each linear to quantize
    floats: dict[str, tuple[int, int]] = field(default_factory=dict)  # (out, in) of each that is not
    faults: list[str] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape ``(out, in)`` of each linear to quantize."""
        return {name: (layout.rows, layout.columns) for name, layout in self.layouts.items()}

    def note(self) -> str:
        """Return a sentence that says what is quantized and what is not, for users."""
        lists = sorted({re.sub(r"\.?\b\d+\..*", "", name) or "the blocks" for name in self.specs})
        text = f"model.free: {len(self.specs)} linears are quantized, in {', '.join(lists)}"
        kinds = sorted({re.sub(r"\b\d+\b", "*", name) for name in self.floats})
        if kinds:
            shown = ", ".join(kinds[:5]) + (f" and {len(kinds) - 5} more" if len(kinds) > 5 else "")
            text += f"; {len(self.floats)} stay in floating point: {shown}"
        return text


def choose(tensors: Mapping[str, Described], quant: QuantConfig, config: Mapping[str, Any]) -> Chosen:
    """Return what ``quant`` quantizes of a model with these ``tensors``, and all faults that names and shapes show.

    ``config`` is the content of the model's ``config.json``.
    """
    chosen, left, total, names = Chosen(), dict[str, int](), 0, list[str]()
    hidden = _hidden_size(config)
    for name in sorted(tensors, key=_in_order):
        linear, described = name.removesuffix(SUFFIX), tensors[name]
        if not described.dtype.is_floating_point:
            continue
        layout, size = _layout(name, described, hidden), math.prod(described.shape)
        decided, in_block = _decided(quant, linear), IN_BLOCK.fullmatch(linear) is not None
        by_pattern = _matches(linear, FLOAT)
        if in_block and not by_pattern:
            total += size
        if layout is not None:
            names.append(linear)
            wanted = in_block and not by_pattern and layout.rows // layout.experts >= MIN_ROWS
            wanted = wanted if decided is None else not decided
            if wanted and (spec := quant.spec_for(linear)) is not None:
                chosen.specs[linear], chosen.layouts[linear] = spec, layout
                chosen.faults += _transposed(linear, layout, tensors.get(f"{linear}.bias"))
            elif in_block:
                chosen.floats[linear] = (layout.rows, layout.columns)
        elif in_block and _is_large(described):
            names.append(linear)
            chosen.floats[linear] = (size // described.shape[-1], described.shape[-1])
            if decided is None and not by_pattern:
                left[linear] = size
            elif decided is False:
                chosen.faults.append(f"quant.overrides: {linear} is no linear by its name and shape; leave skip out")
    chosen.faults += _too_much_left(left, total)
    chosen.faults += _unmatched(quant, names)
    if not chosen.specs and not chosen.faults:
        chosen.faults.append("no tensor is a linear of a numbered block by its name; nothing is left to quantize")
    return chosen


def float_tables(tensors: Mapping[str, Described], chosen: Chosen) -> dict[str, str]:
    """Return the roles of the embeddings and of the head of a report by name, as names and shapes show them.

    A model whose files hold no head computes with the embedding of the most rows, that of the tokens.
    """
    names = [
        name.removesuffix(SUFFIX)
        for name, described in tensors.items()
        if name.endswith(SUFFIX) and len(described.shape) == 2 and described.shape[0] >= MIN_ROWS
    ]
    names = [name for name in names if not (IN_BLOCK.fullmatch(name) or _matches(name, TOWERS))]
    found = [name for name in names if _matches(name, EMBEDDINGS) and name not in chosen.specs]
    found.sort(key=lambda name: -tensors[f"{name}{SUFFIX}"].shape[0])
    heads = [name for name in names if _matches(name, HEADS)]
    roles = {name: f"embedding {name.rpartition('.')[2]}" for name in found}
    roles |= dict.fromkeys(found[:1], "embedding" if heads else "embedding and head (tied)")
    return roles | {name: "head" for name in heads if name not in chosen.specs}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _layout(name: str, described: Described, hidden: int | None) -> Layout | None:
    """Return how a tensor holds a linear or experts; ``None`` if it holds neither."""
    shape = described.shape
    if len(shape) == 2 and name.endswith(SUFFIX):
        return Layout(*shape)
    if len(shape) != 3 or name.rpartition(".")[2] not in FUSED or (shape[1] == hidden) == (shape[2] == hidden):
        return None
    out, columns = shape[1:]
    transposed = (out if name.endswith("down_proj") else columns) != hidden
    out, columns = (columns, out) if transposed else (out, columns)
    return Layout(shape[0] * out, columns, shape[0], transposed)


def _hidden_size(config: Mapping[str, Any]) -> int | None:
    """Return the size of the hidden states of the text model, as its config says."""
    text = config.get("text_config")
    size = (text if isinstance(text, dict) else config).get("hidden_size")
    return size if isinstance(size, int) else None


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names with their numbers as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


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


def _transposed(linear: str, layout: Layout, bias: Described | None) -> Iterator[str]:
    """Yield a fault for a linear whose bias shows that its weight is stored as ``[in, out]``, as GPT-2 does."""
    if bias is not None and bias.shape != (layout.rows,):
        yield (
            f"{linear}{SUFFIX} is {layout.rows} x {layout.columns}, and its bias has {math.prod(bias.shape)} numbers: "
            "weights are stored as [in, out], which only the model's class says for all linears; run without model.free"
        )


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
