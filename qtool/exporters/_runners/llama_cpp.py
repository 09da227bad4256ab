"""llama.cpp, through llama-cpp-python; it rounds the input of each quantized linear to 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import Llama

FILE = "model.gguf"


def load(folder: Path) -> Path:
    """Return the file of the model: the length of the text must be known before it is opened."""
    return folder / FILE


def logits(model: Path, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the logits ``[t, vocabulary]`` of ``tokens`` ``[t]``."""
    length = len(tokens)
    opened = Llama(str(model), n_ctx=length, n_batch=length, n_ubatch=length, logits_all=True, verbose=False)
    opened.eval(tokens.tolist())
    found = np.array(opened.scores[:length], dtype=np.float32)
    opened.close()
    return found


def text_tokens(model: Path, text: str) -> list[int]:
    """Return the tokens of a text, with those that the file says to put around it."""
    opened = Llama(str(model), vocab_only=True, verbose=False)
    found: list[int] = opened.tokenize(text.encode(), add_bos=True, special=True)
    return found
