"""Native checkpoints of tiny models with packed embeddings and heads."""

from pathlib import Path
from typing import Any

from helpers import tiny
from qtool.pipelines.api import quantize

GRID = {"num_bits": 4, "group_size": 32}  # grid of their linears


def written(folder: Path, family: str, tables: dict[str, Any], **quant: Any) -> Path:
    """Write a checkpoint with the grids ``tables`` of embedding and head, beside its float model; return its folder.

    ``family`` is ``tied`` or ``untied``, a Llama, or ``gpt2``, with an embedding of positions.
    """
    float_model = folder / "float" / family
    if not float_model.exists():
        if family == "gpt2":
            tiny.gpt2(float_model)
        else:
            tiny.llama(float_model, tied=family == "tied")
    out = folder / "packed" / "-".join([family, *(f"{key}={tables[key]}" for key in tables)]).replace("/", "_")
    recipe = {"model": {"path": str(float_model)}, "method": {"name": "rtn"}, "quant": GRID | quant | tables}
    quantize(recipe | {"output": {"path": str(out)}})
    return out
