"""onnxruntime runs the decoder graph of a folder, ``model.onnx``, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

FILE = "model.onnx"
DTYPES = {"int64": np.int64, "int32": np.int32, "float": np.float32, "float16": np.float16}


def load(folder: Path) -> Any:
    """Return the session of the graph."""
    return onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])


def logits(model: Any, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the logits ``[t, vocabulary]`` of ``tokens`` ``[t]``, with an empty cache of keys and values."""
    length = len(tokens)
    known = {
        "input_ids": tokens[None],
        "attention_mask": np.ones((1, length), dtype=np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
    }
    feeds = {}
    for each in model.get_inputs():
        dtype = DTYPES[each.type.removeprefix("tensor(").removesuffix(")")]
        # of a cache [batch, heads, past, channels] only heads and channels are numbers
        empty = [size if isinstance(size, int) else int(d == 0) for d, size in enumerate(each.shape)]
        feeds[each.name] = known[each.name].astype(dtype) if each.name in known else np.zeros(empty, dtype=dtype)
    found: npt.NDArray[Any] = model.run(["logits"], feeds)[0][0].astype(np.float32)
    return found
