"""The tables of a model: its embeddings and its output head, and the grids that a recipe gives them.

An embedding is an ``nn.Embedding`` of the text decoder outside the blocks: that of the tokens, of positions (GPT-2), or
of the tokens for each layer (Gemma 3n). The head is the linear that makes the logits. The two are tied in many models:
the head then computes with the embedding's table, which is quantized and stored once.

Embeddings are quantized by searched ranges, and an untied head by the method, as a linear after the last block.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qtool.config.quant import QuantConfig, QuantSpec
from qtool.models.linears import Target, decoder_blocks, text_decoder, weight_of
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import check_weight
from qtool.quant.packed_embedding import PackedEmbedding, TiedLinear, can_stand_for, refuse_resizing
from qtool.system import memory, progress
from qtool.system.errors import InputError

MIN_ROWS = 32  # an embedding with fewer rows, such as that of token types, is small and stays in floating point
EMBEDDING = -1  # the block of a target that is an embedding


@dataclass(frozen=True)
class Tables:
    """The embeddings that a run quantizes, and what the head is.

    ``tied`` has the name of the head, if it reads a packed embedding, with that of the embedding. ``head`` is an untied
    head that the method quantizes: its block has the number of blocks as index.
    """

    embeddings: tuple[Target, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    head: Target | None = None
    floats: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)
    """The float modules that packed ones have replaced, by name."""
    errors: Mapping[str, float] = field(default_factory=dict, repr=False)
    """``|Q(w) - w|**2 / |w|**2`` of each packed embedding, by name."""

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """The grid of each quantized table by name."""
        return {target.name: target.spec for target in self.targets}

    @property
    def targets(self) -> tuple[Target, ...]:
        """The embeddings, and the head if it is untied and quantized."""
        return (*self.embeddings, *self.of_method)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape ``(rows, channels)`` of each quantized table by name."""
        return {target.name: target.weight_shape for target in self.targets}

    @property
    def of_method(self) -> tuple[Target, ...]:
        """The target that the method quantizes, the head, or nothing."""
        return () if self.head is None else (self.head,)


NO_TABLES = Tables()


def embeddings_of(model: nn.Module) -> dict[str, nn.Embedding]:
    """Return the embeddings of the text decoder outside the decoder blocks, by name, that of the tokens first."""
    prefix, decoder = text_decoder(model)
    blocks = f"{decoder_blocks(model)[0]}."
    found = {
        name: module
        for name, module in decoder.named_modules(prefix=prefix)
        if isinstance(module, nn.Embedding) and not name.startswith(blocks) and module.num_embeddings >= MIN_ROWS
    }
    tokens = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    return dict(sorted(found.items(), key=lambda each: each[1] is not tokens))


def embedding_name(model: PreTrainedModel) -> str:
    """Return the name of the embedding of the tokens."""
    tokens = model.get_input_embeddings()
    return next((name for name, module in model.named_modules() if module is tokens), "")


def head_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the name and the module of the output head, ``None`` if the model has none."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(head, nn.Module):
        return None
    return next((name, head) for name, module in model.named_modules() if module is head)


def float_tables(model: nn.Module, quantized: Collection[str]) -> dict[str, str]:
    """Return the tables that are not among ``quantized`` but can be, each with the recipe key that gives it a grid."""
    found = {name: "quant.embedding" for name, module in embeddings_of(model).items() if can_stand_for(module)}
    head = head_of(model)
    if head is not None and isinstance(head[1], nn.Linear) and tied_to(model) is None:
        found[head[0]] = "quant.head"
    return {name: key for name, key in found.items() if name not in quantized}


def table_keys(model: nn.Module) -> dict[str, str]:
    """Return the key of a recipe that has the grid of each embedding and of the output head, by name."""
    head = head_of(model)
    found = dict.fromkeys(embeddings_of(model), "quant.embedding")
    return found if head is None else found | {head[0]: "quant.embedding" if tied_to(model) else "quant.head"}


def select_tables(loaded: LoadedModel, quant: QuantConfig) -> Tables:
    """Return the embeddings and the head that ``quant`` quantizes, with their grids.

    Raises:
        InputError: a grid does not fit a table, head and embedding are tied and get different grids, a packed layer
            cannot stand for one of them, or no weight of the model would stay in floating point.
    """
    asked = quant.table_spec(quant.embedding)
    head, tied = head_of(loaded.model), tied_to(loaded.model)
    head_spec = asked if quant.head == "same" else quant.table_spec(quant.head)
    if tied is not None and head_spec != asked:
        way = "give this grid to quant.embedding" if asked is None else "give both the same grid"
        raise InputError(
            f"{loaded.path}: its output head {tied[0]} computes with the embedding {tied[1]} (tied weights), and "
            f"quant.head is {_said(head_spec)} where quant.embedding is {_said(asked)}; leave quant.head out, or {way}"
        )
    embeddings = tuple(_embeddings(loaded, asked)) if asked is not None else ()
    needed = embedding_name(loaded.model) if tied is None else tied[1]
    if asked is not None and needed not in {target.name for target in embeddings}:
        odd = needed in embeddings_of(loaded.model)
        why = "its class reads the table in a way of its own" if odd else f"it is no table of {MIN_ROWS} rows or more"
        raise InputError(f"{loaded.path}: the embedding {needed} cannot be quantized: {why}; leave quant.embedding out")
    if asked is not None and tied is not None and head is not None and not _is_linear(head[1]):
        raise InputError(
            f"{loaded.path}: its output head {tied[0]}, which computes with the embedding {tied[1]} (tied weights), is "
            f"no plain linear: {type(head[1]).__name__}; leave quant.embedding out"
        )
    target = None
    if head_spec is not None and tied is None and (quant.head != "same" or head is not None):
        target = _head(loaded, head, head_spec)
    tables = Tables(embeddings, {} if asked is None or tied is None else dict([tied]), target)
    if tables.targets and not _floats_left(loaded, quant, tables):
        raise InputError(
            f"{loaded.path}: no weight would stay in floating point, and transformers reads the dtype of a model from "
            f"one; set {'quant.embedding' if target is None else 'quant.head'}: float"
        )
    return tables


def _floats_left(loaded: LoadedModel, quant: QuantConfig, tables: Tables) -> bool:
    """Return whether any weight of the model stays in floating point beside ``tables`` and the linears of blocks."""
    packed = {weight_of(target.linear) for target in tables.targets}
    for block_name, block in loaded.blocks():
        packed |= {
            weight_of(module)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and quant.spec_for(f"{block_name}.{name}") is not None
        }
    return any(parameter not in packed for parameter in loaded.model.parameters() if parameter.is_floating_point())


def _said(spec: QuantSpec | None) -> str:
    return "float" if spec is None else spec.label()


def tied_to(model: nn.Module) -> tuple[str, str] | None:
    """Return the name of the head and that of the embedding whose table it reads, or ``None``."""
    head = head_of(model)
    if head is None:
        return None
    if isinstance(head[1], TiedLinear):
        return next(((head[0], name) for name, each in model.named_modules() if each is head[1].table), None)
    weight = getattr(head[1], "weight", None)
    return next(((head[0], name) for name, each in embeddings_of(model).items() if each.weight is weight), None)


def _embeddings(loaded: LoadedModel, spec: QuantSpec) -> Iterator[Target]:
    """Yield the embeddings that a packed one can stand for, on the grid ``spec``; a note names the others."""
    for name, module in embeddings_of(loaded.model).items():
        if can_stand_for(module):
            yield _checked(loaded, name, module, spec, EMBEDDING, "quant.embedding")
            continue
        line = f"{name} stays in floating point: its class {type(module).__name__} reads the table in a way of its own"
        if line not in loaded.notes:
            progress.note(line)
            loaded.notes.append(line)


def _head(loaded: LoadedModel, head: tuple[str, nn.Module] | None, spec: QuantSpec) -> Target:
    if head is None or not _is_linear(head[1]):
        found = "no output head" if head is None else f"{head[0]} is a {type(head[1]).__name__}"
        raise InputError(
            f"{loaded.path}: quant.head needs an output head that is a linear; found: {found}; set quant.head: float"
        )
    return _checked(loaded, *head, spec, len(loaded.blocks()), "quant.head")


@torch.no_grad()
def _is_linear(head: nn.Module) -> bool:
    """Return whether ``head`` computes what a linear does; a class that derives from it may scale the logits."""
    if not isinstance(head, nn.Linear):
        return False
    weight = weight_of(head)
    if weight.is_meta:  # there are no values to compute with: its class must tell
        return type(head) is nn.Linear
    x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(1, 2, -1)
    expected = F.linear(x, weight, head.bias)
    try:
        found: Tensor = head(x)
        return torch.allclose(found, expected, rtol=0.02, atol=1e-3, equal_nan=True)
    except Exception:  # a class with another signature can fail in any way
        return False


def _checked(loaded: LoadedModel, name: str, module: nn.Module, spec: QuantSpec, block: int, key: str) -> Target:
    """Return the target of a table whose weight fits its grid."""
    weight = weight_of(module)
    try:
        check_weight(weight.detach(), spec, f"{name}.weight", loaded.extremes.get(f"{name}.weight"), overrides=False)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    if loaded.streaming:  # another weight may have been changed in memory, and is not in its file then
        memory.Pages().drop(weight)
    return Target.of(name, module, spec, block)


def put_packed(model: nn.Module, tables: Tables, layers: Mapping[str, PackedEmbedding]) -> dict[str, nn.Module]:
    """Put packed embeddings, and heads that read them, in their places; return the modules replaced, by name."""
    refuse_resizing(model)
    replaced: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        replaced[name] = model.get_submodule(name)
        model.set_submodule(name, layer)
    for head, table in tables.tied.items():
        replaced[head] = model.get_submodule(head)
        bias = getattr(replaced[head], "bias", None)
        model.set_submodule(head, TiedLinear(layers[table], bias if isinstance(bias, nn.Parameter) else None))
    return replaced


@contextmanager
def unpacked(model: nn.Module, tables: Tables) -> Iterator[None]:
    """Put the float modules that packed tables have replaced back in their places inside the ``with`` block."""
    packed = {name: model.get_submodule(name) for name in tables.floats}
    for name, module in tables.floats.items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in packed.items():
            model.set_submodule(name, module)
