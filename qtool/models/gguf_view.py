"""A GGUF file as a model folder of Hugging Face: its config and its tokenizer, and the file in the place of weights.

transformers makes both of the file's metadata, and leaves out in silence what it does not know: scaled rotary
embeddings, biases, how numbers are split. What can be known of these is added here, and an architecture that
transformers reads as another model than llama.cpp does is refused. The ``quantization_config`` of the folder says
``gguf``, so that ``quantized_sources.py`` expands it as it expands FP8.
"""

import json
import re
import shutil
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from qtool.models.auto_class import auto_class
from qtool.models.gguf_config import completed
from qtool.models.gguf_header import Header, read_header
from qtool.models.gguf_splits import SPLITS, pre_tokenizer
from qtool.models.quiet import without_progress_bars
from qtool.system.distribution import install
from qtool.system.errors import InputError, first_line
from qtool.system.scratch import process_folder
from qtool.system.writing import write_text

METHOD = "gguf"  # quant_method in the config.json of such a folder
SUFFIX = ".gguf"
FLOATS = ("F32", "F16", "BF16", "F64")
PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")  # end of the name of a part of a split file
# files of a tokenizer that count before the metadata if they lie beside the file
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def gguf_in(place: Path, key: str) -> Path | None:
    """Return the GGUF file that ``place`` is, or that is all a folder has of a model; ``None`` if it is another model.

    Raises:
        InputError: the folder has several.
    """
    if place.is_file():
        return place if place.suffix == SUFFIX else None
    if (place / "config.json").exists() or not (files := sorted(place.glob(f"*{SUFFIX}"))):
        return None
    if len(files) > 1:
        raise InputError(
            f"{key}: {place} holds {len(files)} GGUF files: {', '.join(file.name for file in files)}; give the path of "
            "one of them"
        )
    return files[0]


def view(file: Path) -> Path:
    """Return a folder with the config and the tokenizer of a GGUF file, and a link to it; this process keeps it.

    Raises:
        InputError: the file cannot be read, or is no language model that transformers reads.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    return _view(file.resolve(), file.name, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)  # a run asks for its model's folder several times; time and size detect a changed file
def _view(file: Path, name: str, modified: int, size: int) -> Path:
    if part := PART.search(name):
        raise InputError(
            f"{file} is one of {int(part[1])} parts of a split GGUF file; join them with llama.cpp's "
            f"llama-gguf-split --merge {name} whole.gguf, and give the path of the result"
        )
    if find_spec("gguf") is None:
        raise InputError(f"{file} is read with the package gguf; install it with: {install('gguf')}")
    header = read_header(file)
    _check(file, header)
    folder = process_folder() / f"{file.stem}-{modified}-{size}"
    folder.mkdir()
    try:
        (folder / name).symlink_to(file)
        with without_progress_bars():
            config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
            config = completed(config, header, partial(_tensor, file))
            if (file.parent / TOKENIZER[0]).is_file():
                for each in filter(Path.is_file, (file.parent / own for own in TOKENIZER)):
                    shutil.copyfile(each, folder / each.name)
            else:
                _write_tokenizer(folder, name, header)
        _write_configs(folder, name, header, config)
    except Exception as error:
        shutil.rmtree(folder)
        # transformers raises errors of many kinds for metadata that it cannot use
        words = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error):.300}"
        raise InputError(f"{file} cannot be read: {words}") from error
    return folder


def source_of(folder: Path) -> Path:
    """Return the GGUF file of a folder that ``view`` has made; ``folder`` itself if it is any other."""
    if folder.parent != process_folder():
        return folder
    return next(folder.glob(f"*{SUFFIX}")).resolve()


def float_types(folder: Path) -> dict[str, str]:
    """Return the type of each tensor, and BF16 of quantized ones; nothing of a folder that ``view`` has not made."""
    file = source_of(folder)
    if file == folder:
        return {}
    return {each.name: each.kind if each.kind in FLOATS else "BF16" for each in read_header(file).tensors}


def _check(file: Path, header: Header) -> None:
    """Refuse a file that is no language model, whose types the package cannot dequantize, or that has no weights."""
    import gguf

    kind = header.metadata.get("general.type", "model")
    if header.architecture == "clip" or kind != "model":
        projector = "the vision or audio projector of a multimodal model"
        what = projector if kind in ("mmproj", "model") else f"no model by itself (general.type: {kind})"
        raise InputError(f"{file} is {what}, not a language model; give the path of the file with the language model")
    if not header.tensors:
        raise InputError(f"{file} holds no tensors, only a vocabulary or metadata; give the path of a whole model")
    for name in sorted({tensor.kind for tensor in header.tensors}):
        number = gguf.GGMLQuantizationType[name]
        _, num_bytes = gguf.GGML_QUANT_SIZES[number]
        try:
            gguf.dequantize(np.zeros((1, num_bytes), np.uint8), number)
        except NotImplementedError:
            raise InputError(
                f"{file} holds tensors of type {name}, which the package gguf {_version()} cannot dequantize; take a "
                "file of the model in another type, such as Q8_0 or BF16"
            ) from None


def _tensor(file: Path, name: str) -> Tensor:
    """Return one tensor of a GGUF file, in float32."""
    import gguf

    found = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)
    return torch.from_numpy(np.array(gguf.dequantize(found.data, found.tensor_type), np.float32))


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")


def _write_tokenizer(folder: Path, name: str, header: Header) -> None:
    """Write the tokenizer of the metadata, which splits text as llama.cpp does.

    Raises:
        InputError: nobody knows how it splits text.
    """
    kind, split = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    begins = header.metadata.get("tokenizer.ggml.add_bos_token")
    if begins is not None and bool(tokenizer.add_bos_token) != begins:
        tokenizer.add_bos_token = begins  # transformers knows better for some kinds, and llama.cpp reads the file
    steps = tokenizer.backend_tokenizer.pre_tokenizer
    if header.metadata.get("tokenizer.ggml.add_space_prefix") is False and isinstance(steps, pre_tokenizers.Metaspace):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    if kind == "gpt2":  # byte-level; others split at spaces alone
        if (found := pre_tokenizer(str(split))) is not None:
            tokenizer.backend_tokenizer.pre_tokenizer = found[0]
            tokenizer.backend_tokenizer.model.ignore_merges = found[1]
        elif split not in _known_to_transformers():
            known = sorted({*SPLITS.values(), *_known_to_transformers()})
            raise InputError(
                f"its tokenizer splits text as {split!r} (tokenizer.ggml.pre), and known "
                f"are {', '.join(known)}; put tokenizer.json and tokenizer_config.json of the original model beside "
                "the file, which then count"
            )
    tokenizer.save_pretrained(folder)


def _known_to_transformers() -> tuple[str, ...]:
    """Return the names of ways to split text that transformers' reader of GGUF knows."""
    from transformers.integrations import gguf as reader

    mapping = getattr(reader, "gguf_tokenizer_mapping", None)
    return tuple(getattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS", ()))


def _write_configs(folder: Path, name: str, header: Header, config: PreTrainedConfig) -> None:
    """Write the config, which says that the weights are in a GGUF file, and a model card with the file's licence."""
    raw: dict[str, Any] = config.to_diff_dict() | {"dtype": "bfloat16"}
    raw.pop("_model_name_or_path", None)
    raw["architectures"] = [auto_class(config)._model_mapping[type(config)].__name__]
    raw["quantization_config"] = {"quant_method": METHOD, "gguf_file": name}
    if licence := header.metadata.get("general.license"):
        write_text(folder / "README.md", f"---\nlicense: {' '.join(str(licence).split())}\n---\n")
    write_text(folder / "config.json", json.dumps(raw, indent=2))
