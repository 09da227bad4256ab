"""Model folders: find them, read their config, and refuse files that are damaged or unsafe to read.

A folder of somebody else is checked here before any library opens a file of it: libraries wait for a FIFO, read a
device until memory is full, and raise errors of many kinds.
"""

import os
import re
import stat
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtool.models import gguf_view
from qtool.system import paths, reading
from qtool.system.errors import InputError, first_line

BUILTIN = Path(__file__).parent / "builtin"  # the folder of built-in models
ADAPTER = "adapter_config.json"  # config of a LoRA adapter and its kind, which peft writes
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # pattern of a model's name on the hub
# files of a model that are downloaded; its card says the licence, and other files have its text
HUB_FILES = [
    *("*.safetensors", "*.json", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.txt", "*.jinja", "README.md"),
    *("*LICENSE*", "*LICENCE*", "*NOTICE*", "COPYING*", "*USE_POLICY*"),
]
# files of a model folder that are read whole: config, tokenizer, chat templates, index of shards, our manifest
SMALL = (
    *("*config.json", "*index.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *(
        "chat_template.json",
        "qtool.json",
        "*.jinja",
        "merges.txt",
        "vocab.txt",
        "*.model",
        "*.model.v*",
        "*.spm",
        "*.tiktoken",
    ),
)
LAYER_COUNTS = re.compile(r"num_(\w+_)?(layers|blocks|experts)|n_(\w+_)?(layers?|experts)|depth")  # keys of a config
MAX_LAYERS = 2000  # most layers or blocks that a config may ask for; building more takes minutes
MAX_EXPERTS = 20_000  # most experts; Doge's configs say 16,384 where the model is dense
TEMPLATES = "additional_chat_templates"  # folder of chat templates in a model folder
# patterns of the names of small files that a model folder has beside its weights
SIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.codes")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")  # files of weights that can run code when they are read
# floating-point dtypes by their names in safetensors files
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def resolve(path: str, *, fetch: bool = True, key: str = "model.path", files: Sequence[str] = HUB_FILES) -> Path:
    """Return the local folder of a model; a model of the hub, or its ``files``, is downloaded into the hub's cache.

    Of a GGUF file, or a folder with one and no ``config.json``, it is a folder that stands for it (``gguf_view.py``).

    Without ``fetch``, a model of the hub must be in the cache already. ``key`` is the recipe key that holds ``path``.

    Raises:
        InputError: there is no such built-in model, folder or model of the hub, or the hub cannot be reached.
    """
    if path.startswith("builtin:"):
        known = {f"builtin:{each.name}": each for each in sorted(BUILTIN.iterdir()) if each.is_dir()}
        if path not in known:
            raise InputError(f"{key}: there is no model {path}; built in: {', '.join(known)}")
        return known[path]
    folder = paths.expand(path, key)
    if folder.exists() and (file := gguf_view.gguf_in(folder, key)) is not None:
        return gguf_view.view(file)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(
            f"{key}: {path} is a file; a folder with config.json and safetensors, or a .gguf file, is needed"
        )
    if path.startswith((".", "/", "~", "$")) or not HUB_NAME.fullmatch(path):
        kind = "file" if path.endswith(".gguf") else "folder"
        raise InputError(f"{key}: there is no {kind} {path}")
    try:
        return Path(snapshot_download(path, allow_patterns=[*files], local_files_only=not fetch))
    except Exception as error:  # errors of many kinds: no such model, no permission, no network
        raise InputError(f"{key}: there is no folder {path}, and {_of_hub(path, error)}") from error


def _of_hub(name: str, error: Exception) -> str:
    """Return why the hub gives no model ``name``, and what to do."""
    if isinstance(error, GatedRepoError):
        return (
            f"the model of that name on the hub is gated: accept its licence at {constants.ENDPOINT}/{name}, then give "
            "your token with hf auth login or HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "the hub has no model of that name, or it is private: correct the name, or give your token with hf auth "
            "login or HF_TOKEN"
        )
    if not isinstance(error, LocalEntryNotFoundError):
        return f"the hub does not give a model of that name: {first_line(error)}"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub ({constants.ENDPOINT}) does not answer"
    return (
        f"the model is not in the cache of the hub, {constants.HF_HUB_CACHE}, and {why}; download it where the hub "
        f"can be reached (hf download {name}), or give a local folder"
    )


def has_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, alone or beside a model."""
    return (folder / ADAPTER).exists() or any(folder.glob("adapter_model.*"))


def _adapter(folder: Path) -> str:
    """Return why the folder of an adapter is no model, and what to do."""
    config = reading.read_object(folder / ADAPTER) if (folder / ADAPTER).exists() else {}
    base = config.get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    return (
        f"{folder} holds an adapter{of} ({ADAPTER}), not a whole model; merge it into its model "
        "(merge_and_unload of peft), save that with its tokenizer, and give the folder"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json`` of a model folder.

    Raises:
        InputError: the file is missing, no regular file, or no JSON object, or it asks for too many layers.
    """
    try:
        config = reading.read_object(folder / "config.json")
    except FileNotFoundError:
        if has_adapter(folder):
            raise InputError(_adapter(folder)) from None
        raise InputError(
            f"{folder} has no config.json; is it a Hugging Face model folder? Of a GGUF model of the hub, download the "
            "file and give its path"
        ) from None
    if not isinstance(section := config.get("quantization_config"), dict | None):
        raise InputError(f"{folder / 'config.json'}: quantization_config is a {type(section).__name__}, not an object")
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        for key, value in part.items():
            most = MAX_EXPERTS if key.endswith("experts") else MAX_LAYERS
            if LAYER_COUNTS.fullmatch(key) and isinstance(value, int) and value > most:
                raise InputError(f"{folder / 'config.json'}: {key} is {value:.3g}; at most {most} are taken")
    return config


def check_readable(folder: Path) -> None:
    """Refuse a folder with a file that a library would open and cannot read, before one does.

    Each file must be regular, links followed; all but weights must be of a bounded size, and JSON must be JSON.

    Raises:
        InputError: the message names the file and says what it is.
    """
    try:
        found = [*folder.iterdir(), *((folder / TEMPLATES).iterdir() if (folder / TEMPLATES).is_dir() else ())]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    for file in sorted(found):
        small = any(fnmatchcase(file.name, pattern) for pattern in SMALL)
        if not small and not file.name.endswith((".safetensors", ".gguf")):
            continue
        status = _regular(file)
        if small and status.st_size > reading.LIMIT:
            limit = f"{reading.LIMIT / 2**20:.0f} MiB"
            raise InputError(f"{file} has {status.st_size / 2**20:.0f} MiB; such a file has at most {limit}")
        if small and file.suffix == ".json":
            _check_json(file, status.st_mtime_ns, status.st_size)


def _regular(file: Path) -> os.stat_result:
    """Return the status of a file that can be read; raise an ``InputError`` for anything else."""
    try:
        status = file.stat()
    except OSError as error:  # a link to nothing or to itself
        raise InputError(f"{file} cannot be read: {error.strerror}; copy or download it again") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{file} is {reading.kind_of(status.st_mode)}; a regular file is needed")
    if not os.access(file, os.R_OK):
        raise InputError(f"{file} cannot be read: you lack the permission")
    return status


@lru_cache(maxsize=256)  # a tokenizer.json of 30 MB takes half a second, and a run opens a folder several times
def _check_json(file: Path, modified: int, size: int) -> None:
    """Refuse a file that is not JSON; ``modified`` and ``size`` tell a file from what it was before."""
    reading.read_json(file)


def open_safetensors(file: Path) -> Any:  # Any: safe_open is not typed
    """Open a safetensors file; only its header is read.

    Raises:
        InputError: it is no regular file, cannot be read, or is truncated or damaged.
    """
    _regular(file)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{file} is truncated or damaged ({error}); copy or download it again") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}; copy or download it again") from None


def check_files(folder: Path) -> dict[str, torch.dtype]:
    """Refuse files that cannot be read, pickled weights, and safetensors files that are not complete.

    Return the dtype of every floating-point tensor, by its name in the files.
    """
    check_readable(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files and (floats := gguf_view.float_types(folder)):
        return {name: FLOATS[kind] for name, kind in floats.items()}
    if not files:
        pickled = sorted(p.name for pattern in PICKLED for p in folder.glob(pattern))
        if pickled:
            raise InputError(
                f"{folder} holds only pickled weights ({pickled[0]}), which can run code when read; "
                "convert them to safetensors first"
            )
        if ggufs := sorted(folder.glob("*.gguf")):
            raise InputError(f"{folder} has no *.safetensors file; to read its GGUF file, give the path {ggufs[0]}")
        raise InputError(f"{folder} has no *.safetensors file; is it a Hugging Face model folder?")
    _check_index(folder / "model.safetensors.index.json", {file.name for file in files})
    dtypes: dict[str, torch.dtype] = {}
    for file in files:
        with open_safetensors(file) as reader:
            for name in reader.keys():  # noqa: SIM118  (not a dict)
                dtype = FLOATS.get(reader.get_slice(name).get_dtype())
                if dtype is not None:
                    dtypes[name] = dtype
    return dtypes


def belongs(file: Path, folder: Path) -> bool:
    """Return whether a resolved file is in the resolved ``folder``, or in the hub's cache of the same model."""
    places = [folder]
    if folder.parent.name == "snapshots":  # the cache has models--*/snapshots/<revision> and models--*/blobs
        places.append((folder.parent.parent / "blobs").resolve())
    return any(file.is_relative_to(place) for place in places)


def stored_tensor(folder: Path, name: str) -> Tensor | None:
    """Return a tensor of a model folder as its file holds it; ``None`` if no file has one of that name."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            if name in reader.keys():  # noqa: SIM118  (not a dict)
                tensor: Tensor = reader.get_tensor(name)
                return tensor
    return None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads: those of the index, or ``model.safetensors``, or all.

    Some folders hold the weights twice, in shards and in one file of another name.
    """
    try:
        weight_map = reading.read_object(folder / "model.safetensors.index.json")["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    except FileNotFoundError:
        single = folder / "model.safetensors"
        return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def _check_index(index: Path, files: set[str]) -> None:
    try:
        weight_map = reading.read_object(index).get("weight_map")
    except FileNotFoundError:
        return
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(
            f"{index} is not an index of shards: weight_map should be a mapping of tensors to file names; copy or "
            "download it again"
        )
    listed = set(weight_map.values())
    if missing := sorted(listed - files):
        raise InputError(
            f"{index} lists {missing[0]}, which is not there ({len(missing)} file(s) missing); copy or download the "
            "model again"
        )
