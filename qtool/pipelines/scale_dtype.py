"""``quant.scale_dtype: auto``: the dtype of scales, chosen for the model and for what its result is written as.

Formats that hold the scales of a quantized linear and all other tensors in one dtype, such as compressed-tensors, need
float32 for both where the scales are float16 and the model is bfloat16. Other formats hold float16 scales only.
"""

from pathlib import Path

import torch

from qtool.config.engines import FORMATS, READS
from qtool.config.recipe import Recipe
from qtool.models.folders import check_files, read_config, resolve
from qtool.models.gguf_view import float_types
from qtool.models.loaded import most_common

OTHERS = "float16"  # where the model, or what it is written as, has no bfloat16


def chosen(recipe: Recipe, dtype: torch.dtype | None = None) -> Recipe:
    """Return the recipe with a dtype in the place of ``auto``; ``dtype`` is the model's, ``None``: that of its files.

    Raises:
        InputError: there is no such model, or its files cannot be read.
    """
    if recipe.quant.scale_dtype != "auto":
        return recipe
    if not _hold(recipe, "bfloat16"):
        found = OTHERS
    else:
        own = _own(resolve(recipe.model.path)) if dtype is None else dtype
        found = "bfloat16" if own == torch.bfloat16 else OTHERS
    return recipe.model_copy(update={"quant": recipe.quant.model_copy(update={"scale_dtype": found})})


def _hold(recipe: Recipe, dtype: str) -> bool:
    """Return whether all exports hold scales of ``dtype``, or without exports, a format that the target reads."""
    if recipe.export:
        return all(dtype in FORMATS[entry.format].scale_dtypes for entry in recipe.export)
    if recipe.target is None:
        return True
    read = [row.format for row in READS if row.engine == recipe.target.engine and not row.on_request]
    return any(dtype in FORMATS[name].scale_dtypes for name in read)


def _own(folder: Path) -> torch.dtype:
    """Return the dtype of most tensors in the files of a model; that of its ``config.json`` if there are none.

    A model that is stored in FP8 is expanded to the dtype of its ``config.json``.
    """
    raw = read_config(folder)
    expanded = "quantization_config" in raw  # FP8 and its like, to the dtype of the config
    if not expanded and (any(folder.glob("*.safetensors")) or float_types(folder)):
        return most_common(check_files(folder))
    text = raw.get("text_config")
    sections = (text if isinstance(text, dict) else {}, raw)
    names = [section.get(key) for section in sections for key in ("dtype", "torch_dtype")]
    found = getattr(torch, str(next((name for name in names if name), "bfloat16")), None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16
