"""onnxruntime runs the decoder graph of a folder, ``model.onnx``, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime

FILE, GENAI = "model.onnx", "genai_config.json"
DTYPES = {"int64": np.int64, "int32": np.int32, "float": np.float32, "float16": np.float16}


class Model(NamedTuple):
    """A session of the graph, and the channels of a head of keys and values."""

    session: Any
    channels: int


def load(folder: Path) -> Model:
    """Return the model."""
    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    decoder = json.loads((folder / GENAI).read_text(encoding="utf-8"))["model"]["decoder"]
    return Model(session, decoder["head_size"])


def logits(model: Model, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the logits ``[t, vocabulary]`` of ``tokens`` ``[t]``, with an empty cache of keys and values."""
    length = len(tokens)
    known = {
        "input_ids": tokens[None],
        "attention_mask": np.ones((1, length), dtype=np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
    }
    feeds = {}
    for each in model.session.get_inputs():
        dtype = DTYPES[each.type.removeprefix("tensor(").removesuffix(")")]
        if each.name in known:
            feeds[each.name] = known[each.name].astype(dtype)
        else:
            feeds[each.name] = np.zeros((1, each.shape[1], 0, model.channels), dtype=dtype)
    found: npt.NDArray[Any] = model.session.run(["logits"], feeds)[0][0].astype(np.float32)
    return found
