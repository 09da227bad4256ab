"""Model folders: find them, read their config, and refuse files that are damaged or unsafe to read."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtool.system.errors import InputError, first_line

BUILTIN = Path(__file__).parent / "builtin"  # the folder of built-in models
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # pattern of a model's name on the hub
# files of a model that are downloaded
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.txt", "*.jinja"]
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")  # files of weights that can run code when they are read
# floating-point dtypes by their names in safetensors files
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def resolve(path: str, *, fetch: bool = True, key: str = "model.path") -> Path:
    """Return the local folder of a model; a model of the hub is downloaded into the hub's cache.

    Without ``fetch``, a model of the hub must be in the cache already. ``key`` is the recipe key that holds ``path``.

    Raises:
        InputError: there is no such built-in model, folder or model of the hub, or the hub cannot be reached.
    """
    if path.startswith("builtin:"):
        folder = BUILTIN / path.removeprefix("builtin:")
        if not folder.is_dir():
            known = sorted(f"builtin:{p.name}" for p in BUILTIN.iterdir() if p.is_dir())
            raise InputError(f"there is no model {path}; built in: {', '.join(known)}")
        return folder
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{key}: {path} is a file; a folder with config.json and safetensors is needed")
    if path.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(path):
        raise InputError(f"{key}: there is no folder {path}")
    try:
        return Path(snapshot_download(path, allow_patterns=HUB_FILES, local_files_only=not fetch))
    except Exception as error:  # errors of many kinds: no such model, no permission, no network
        raise InputError(
            f"{key}: there is no folder {path}, and the hub does not give a model of that name: {first_line(error)}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json`` of a model folder."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no config.json; is it a Hugging Face model folder?") from None
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} holds a {type(config).__name__}; a JSON object was expected")
    return config


def check_files(folder: Path) -> dict[str, torch.dtype]:
    """Refuse pickled weights and safetensors files that are not complete, before anything is loaded.

    Return the dtype of every floating-point tensor, by its name in the files.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for pattern in PICKLED for p in folder.glob(pattern))
        if pickled:
            raise InputError(
                f"{folder} holds only pickled weights ({pickled[0]}), which can run code when read; "
                "convert them to safetensors first"
            )
        raise InputError(f"{folder} has no *.safetensors file; is it a Hugging Face model folder?")
    _check_index(folder / "model.safetensors.index.json", {file.name for file in files})
    dtypes: dict[str, torch.dtype] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118  (not a dict)
                    dtype = FLOATS.get(reader.get_slice(name).get_dtype())
                    if dtype is not None:
                        dtypes[name] = dtype
        except SafetensorError as error:
            raise InputError(f"{file} is truncated or damaged ({error}); copy or download it again") from None
    return dtypes


def stored_tensor(folder: Path, name: str) -> Tensor | None:
    """Return a tensor of a model folder as its file holds it; ``None`` if no file has one of that name."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            if name in reader.keys():  # noqa: SIM118  (not a dict)
                tensor: Tensor = reader.get_tensor(name)
                return tensor
    return None


def _check_index(index: Path, files: set[str]) -> None:
    if not index.exists():
        return
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not an index of shards ({error!r}); copy or download it again") from None
    if missing := sorted(listed - files):
        raise InputError(
            f"{index} lists {missing[0]}, which is not there ({len(missing)} file(s) missing); copy or download the "
            "model again"
        )
