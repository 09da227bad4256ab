"""The ``quantization_config`` section of a native checkpoint: which linears are packed, and on which grids.

A leaf, so that transformers can be taught our format while ``qtool.models`` is itself being imported.
"""

from collections import Counter
from typing import Any

from pydantic import ValidationError

from qtool.config import FORMAT_VERSION, QuantSpec
from qtool.errors import InputError

SPEC_KEYS = tuple(QuantSpec.model_fields)


def describe(specs: dict[str, QuantSpec]) -> dict[str, Any]:
    """The ``quantization_config`` of a native checkpoint: the most common grid, the linears, and who differs."""
    common = Counter(specs.values()).most_common(1)[0][0].model_dump()
    overrides = {
        name: {key: value for key, value in spec.model_dump().items() if value != common[key]}
        for name, spec in specs.items()
    }
    return {
        "quant_method": "qtool",
        "format_version": FORMAT_VERSION,
        **common,
        "linears": list(specs),
        "overrides": {name: changes for name, changes in overrides.items() if changes},
    }


def label(specs: dict[str, QuantSpec]) -> str:
    """The grids in short: ``w4g128``, or ``mixed w4g128 w2g64``."""
    labels = Counter(spec.label() for spec in specs.values())
    return next(iter(labels)) if len(labels) == 1 else "mixed " + " ".join(labels)


def specs_of(section: dict[str, Any]) -> dict[str, QuantSpec]:
    """The grid of each quantized linear that a ``quantization_config`` lists.

    Raises:
        InputError: not ours, or written by a later version.
    """
    if not isinstance(section, dict):
        raise InputError(f"quantization_config is a {type(section).__name__}; an object was expected")
    if section.get("quant_method") != "qtool":
        raise InputError(f"quantization_config names {section.get('quant_method')!r}, not a qtool checkpoint")
    version = section.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"the checkpoint has format version {version}, this qtool reads {FORMAT_VERSION}; upgrade qtool"
        )
    try:
        section = {"float_zero": False, **section}  # folders from before that key lack it
        common = {key: section[key] for key in SPEC_KEYS}
        specs = {name: QuantSpec(**(common | section["overrides"].get(name, {}))) for name in section["linears"]}
        if not specs or not all(isinstance(name, str) for name in specs):
            raise TypeError("linears must be a list of names")
        return specs
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise InputError(f"quantization_config is damaged: {error}") from None
