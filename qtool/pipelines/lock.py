"""The lock of a run: everything that the bytes of its result depend on.

These are the recipe's keys that change a bit, the hashes of the model's files, the versions of the software, the CPU,
and the numbers of threads and processes. A run continues only under the lock that it was begun with, and ``qtool
reproduce`` compares two locks to explain why bytes differ.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from pydantic import JsonValue

from qtool.checkpoints.files import file_hashes
from qtool.config.recipe import Recipe, resolved
from qtool.config.sections import KEYS_WITHOUT_EFFECT
from qtool.models.folders import check_files
from qtool.models.gguf_view import source_of
from qtool.pipelines import scale_dtype
from qtool.reports.records import Lock
from qtool.system import distributed
from qtool.system.environment import environment, processor

# files of a float model whose hashes are in the lock
LOCKED_FILES = ("*.safetensors", "config.json", "tokenizer*", "*.model", "vocab*", "merges*")
LOCKED_PACKAGES = ("qtool", "torch", "transformers", "tokenizers")  # packages whose versions are in the lock
LOCKED_SECTIONS = ("model", "method", "quant", "data", "seed")  # sections of a recipe that are in the lock


def lock_of(recipe: Recipe, folder: Path, model_files: dict[str, str] | None = None) -> Lock:
    """Return the lock of a run of ``recipe`` on the model in ``folder``; ``model_files``: its hashes, if known.

    It has the dtype of scales that ``quant.scale_dtype: auto`` comes to.
    """
    if model_files is None:
        check_files(folder)
    keys = _without(resolved(scale_dtype.chosen(recipe)), KEYS_WITHOUT_EFFECT)
    return Lock.model_validate(
        {section: keys[section] for section in LOCKED_SECTIONS}
        | {
            "model_files": _model_hashes(folder) if model_files is None else model_files,
            "versions": {name: version for name, version in environment().items() if name in LOCKED_PACKAGES},
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "processes": distributed.world_size(),
        }
    )


def _model_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a model by its name; of one in a GGUF file also that of the file."""
    return file_hashes(folder, *LOCKED_FILES, *(("*.gguf",) if source_of(folder) != folder else ()))


def differences(before: Lock, now: Lock, without: Collection[str] = ()) -> list[str]:
    """Return ``dotted.key: before -> now`` for every value that differs, except for the keys ``without``."""
    old, new = (each.model_dump(mode="json", exclude=set(without)) for each in (before, now))
    return list(_differences(old, new))


def _differences(before: JsonValue, now: JsonValue, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{key}: {_short(before)} -> {_short(now)}"


def _short(value: JsonValue) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unlocked(recipe: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the keys of a recipe that its finished result depends on and no lock holds: evaluation, exports, output.

    The result does not depend on the tracker, nor on whether a folder was replaced; the gate judges it.
    """
    output = recipe["output"]
    assert isinstance(output, dict)
    kept = {key: value for key, value in recipe.items() if key not in (*LOCKED_SECTIONS, "tracker", "gate")}
    return kept | {"output": {key: value for key, value in output.items() if key != "overwrite"}}


def _without(keys: dict[str, JsonValue], names: Collection[str]) -> dict[str, JsonValue]:
    """Return ``keys`` without the keys called ``names``, in nested sections too."""
    return {k: _without(v, names) if isinstance(v, dict) else v for k, v in keys.items() if k not in names}
