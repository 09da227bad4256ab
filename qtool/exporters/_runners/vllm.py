"""vLLM, which gives the log-probabilities of all tokens: logits up to a number for each position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm import LLM, SamplingParams


def load(folder: Path) -> Any:
    """Return the engine with the dtype of the folder, compiling nothing."""
    return LLM(str(folder), enforce_eager=True, max_logprobs=-1, logprobs_mode="raw_logprobs")


def logits(model: Any, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return log-probabilities ``[t, vocabulary]``; of the last position, that of the next token."""
    ask = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, logprobs=-1)
    (done,) = model.generate([{"prompt_token_ids": tokens.tolist()}], ask)
    rows = [*done.prompt_logprobs[1:], done.outputs[0].logprobs[0]]
    found = np.full((len(rows), max(max(row) for row in rows) + 1), -np.inf, dtype=np.float32)
    for at, row in enumerate(rows):
        found[at, list(row)] = [each.logprob for each in row.values()]
    return found
