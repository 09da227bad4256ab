"""The lock of a run: everything that the bytes of its result depend on."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from qtool.checkpoints.files import file_hashes
from qtool.config.recipe import Recipe, resolved
from qtool.config.sections import IMMATERIAL
from qtool.models.folders import check_files
from qtool.system import distributed
from qtool.system.environment import environment, processor

Lock = dict[str, Any]
LOCKED_FILES = ("*.safetensors", "config.json", "tokenizer*", "*.model", "vocab*", "merges*")
LOCKED_PACKAGES = ("qtool", "torch", "transformers", "tokenizers")


def differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """``dotted.key: before -> now`` for every value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{key}: {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def lock_of(recipe: Recipe, folder: Path, model_files: dict[str, str] | None = None) -> dict[str, Any]:
    """What the bytes of the result depend on; ``model_files`` are the hashes of ``folder`` where they are known."""
    if model_files is None:
        check_files(folder)
    recipe_keys = _without(resolved(recipe), IMMATERIAL)
    return {
        **{section: recipe_keys[section] for section in ("model", "method", "quant", "data", "seed")},
        "model_files": file_hashes(folder, *LOCKED_FILES) if model_files is None else model_files,
        "versions": {name: version for name, version in environment().items() if name in LOCKED_PACKAGES},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": distributed.count(),
    }


def _without(keys: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """``keys`` without those called so, in sections inside it too."""
    return {k: _without(v, names) if isinstance(v, dict) else v for k, v in keys.items() if k not in names}
