"""llama.cpp, through llama-cpp-python; it rounds the input of each quantized linear to 8 bits."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llama_cpp import GGML_TYPE_F32, Llama

FILE = "model.gguf"


class Model(NamedTuple):
    """A file, and how it is opened: the length of the text must be known before."""

    file: Path
    options: dict[str, Any]
    scratch: Any = None
    """The folder of a file that was written for this process."""


def load(folder: Path, float32: bool = False) -> Model:
    """Return the model. In ``float32`` weights, keys and values are that, so that no input is rounded.

    Then only the order of sums differs from other software, and GELU, which llama.cpp takes from a table of float16.
    """
    if not float32:
        return Model(folder / FILE, {})
    scratch = tempfile.TemporaryDirectory(prefix="qtool-runner-")
    file = _widened(folder / FILE, Path(scratch.name) / FILE)
    return Model(file, {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}, scratch)


def _widened(file: Path, out: Path) -> Path:
    """Write ``file`` with every tensor dequantized to float32 to ``out``; the metadata stays."""
    import gguf

    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            writer.add_key_value(key, field.contents(), kind, inner[0] if inner else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def logits(model: Model, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the logits ``[t, vocabulary]`` of ``tokens`` ``[t]``."""
    length = len(tokens)
    sizes = {"n_ctx": length, "n_batch": length, "n_ubatch": length}
    opened = Llama(str(model.file), **sizes, **model.options, logits_all=True, verbose=False)
    opened.eval(tokens.tolist())
    found = np.array(opened.scores[:length], dtype=np.float32)
    opened.close()
    return found


def text_tokens(model: Model, text: str) -> list[int]:
    """Return the tokens of a text, with those that the file says to put around it."""
    opened = Llama(str(model.file), vocab_only=True, verbose=False)
    found: list[int] = opened.tokenize(text.encode(), add_bos=True, special=True)
    return found
