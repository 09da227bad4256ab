"""The ``quantization_config`` section of a native checkpoint: the packed linears and the grid of each.

This module imports no other of its room and no model, so that ``transformers_hook.py`` can be imported at any time.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import ValidationError

from qtool.config.quant import ACTIVATION_KEYS, QuantSpec
from qtool.quant.packed_weight import ACTIVATIONS_VERSION, FORMAT_VERSION, GRIDS_VERSION, TABLES_VERSION
from qtool.system.errors import InputError

# values of the keys that folders of earlier versions lack
ABSENT = {"grid": "affine", "float_zero": False, "negative_scales": None}
SPEC_KEYS = tuple(QuantSpec.model_fields)  # keys of the section that describe a grid
FREE = "model_free"  # key of the section: the checkpoint was made from files alone (``free.py``)


class PackedTables(NamedTuple):
    """The packed embeddings of a checkpoint, heads that read them (head -> embedding), and a packed head that does not.

    Without the model's class a head is known by its name alone, so ``head`` is empty in a checkpoint of ``model.free``.
    """

    embeddings: tuple[str, ...] = ()
    tied: Mapping[str, str] = MappingProxyType({})
    head: str = ""

    def linears(self, specs: Mapping[str, QuantSpec]) -> dict[str, QuantSpec]:
        """Return the grids in ``specs`` of the linears of the decoder blocks."""
        return {name: spec for name, spec in specs.items() if name not in {*self.embeddings, self.head}}


NO_TABLES = PackedTables()


def section_of(specs: dict[str, QuantSpec], tables: PackedTables = NO_TABLES) -> dict[str, Any]:
    """Return the ``quantization_config``: the most common grid, all packed linears, and the grids that differ.

    ``specs`` are the grids of linears and of the embeddings of ``tables``.
    """
    by_blocks = any(spec.blocks is not None for spec in specs.values())

    def keys(spec: QuantSpec) -> dict[str, Any]:
        return spec.model_dump() | ({"grid": spec.grid} if by_blocks else {})

    common = keys(Counter(specs.values()).most_common(1)[0][0])
    rounding = any(getattr(spec, key) is not None for spec in specs.values() for key in ACTIVATION_KEYS)
    if not rounding:
        common = {key: value for key, value in common.items() if key not in ACTIVATION_KEYS}
    if all(spec.negative_scales is None for spec in specs.values()):
        del common["negative_scales"]
    overrides = {
        name: {key: value for key, value in keys(spec).items() if value != common.get(key)}
        for name, spec in specs.items()
    }
    version = ACTIVATIONS_VERSION if rounding else FORMAT_VERSION
    version = TABLES_VERSION if tables.embeddings else version
    section = {
        "quant_method": "qtool",
        "format_version": GRIDS_VERSION if by_blocks else version,
        **common,
        "linears": [name for name in specs if name not in tables.embeddings],
        "overrides": {name: changes for name, changes in overrides.items() if changes},
    }
    return section | ({"embeddings": list(tables.embeddings), "tied": dict(tables.tied)} if tables.embeddings else {})


def tables_of(section: dict[str, Any]) -> PackedTables:
    """Return the packed embeddings that a ``quantization_config`` lists."""
    # the name of a linear in a block has the block's number
    outside = (name for name in section["linears"] if not any(map(str.isdigit, name.split("."))))
    head = "" if FREE in section else next(outside, "")
    return PackedTables(tuple(section.get("embeddings", ())), dict(section.get("tied", {})), head)


def grids_label(specs: dict[str, QuantSpec], tables: PackedTables = NO_TABLES) -> str:
    """Return the grids in short: ``w4g128``, ``mixed w4g128 w2g64``, ``w4g128 a8 kv4``, or ``w8pc a8 sym``.

    The grids of ``tables`` follow as in ``w4g64, embedding w8pc``, which is also the head of a tied model, ``w4g64,
    embedding and head w8pc``, or ``w4g64, embedding w8pc, head w4g64``.
    """
    parts = [_label_of(tables.linears(specs).values())] if tables.linears(specs) else []
    embedding = _label_of(specs[name] for name in tables.embeddings) if tables.embeddings else ""
    head = _label_of([specs[tables.head]]) if tables.head else ""
    if embedding and embedding == head:
        return ", ".join([*parts, f"embedding and head {head}"])
    found = {"embedding": embedding, "head": head}
    return ", ".join([*parts, *(f"{name} {label}" for name, label in found.items() if label)])


def _label_of(specs: Iterable[QuantSpec]) -> str:
    specs = list(specs)
    labels = Counter(spec.label() for spec in specs)
    parts = list(labels) if len(labels) == 1 else ["mixed", *labels]
    for key, short in (("activations", "a"), ("kv_cache", "kv")):
        widths = sorted({str(grid) for spec in specs if (grid := getattr(spec, key)) is not None})
        parts += [short + "/".join(widths)] if widths else []
    return " ".join(parts)


def specs_of(section: dict[str, Any]) -> dict[str, QuantSpec]:
    """Return the grid of each quantized linear, then of each embedding, that a ``quantization_config`` lists.

    Raises:
        InputError: the section is not of qtool, is damaged, or was written by a later version.
    """
    if not isinstance(section, dict):
        raise InputError(f"quantization_config is a {type(section).__name__}; an object was expected")
    if section.get("quant_method") != "qtool":
        raise InputError(f"quantization_config names {section.get('quant_method')!r}, not a qtool checkpoint")
    version = section.get("format_version")
    if version not in (FORMAT_VERSION, ACTIVATIONS_VERSION, TABLES_VERSION, GRIDS_VERSION):
        raise InputError(
            f"the checkpoint has format version {version}; this qtool reads up to {GRIDS_VERSION}: upgrade qtool"
        )
    try:
        section = {**ABSENT, **dict.fromkeys(ACTIVATION_KEYS), **section}
        common = {key: section[key] for key in SPEC_KEYS}
        names = [*section["linears"], *tables_of(section).embeddings]
        specs = {name: QuantSpec(**(common | section["overrides"].get(name, {}))) for name in names}
        if not specs or not all(isinstance(name, str) for name in specs):
            raise TypeError("linears and embeddings must be lists of names")
        return specs
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise InputError(f"quantization_config is damaged: {error}") from None
