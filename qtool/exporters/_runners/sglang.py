"""SGLang, which gives the log-probabilities of the most likely tokens: as many are asked for as there are tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sglang import Engine


class Model(NamedTuple):
    """The engine and the number of tokens that it knows."""

    engine: Any
    vocabulary: int


def load(folder: Path) -> Model:
    """Return the engine, compiling nothing."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.get("vocab_size") or config["text_config"]["vocab_size"]
    return Model(Engine(model_path=str(folder), disable_cuda_graph=True), size)


def logits(model: Model, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return log-probabilities ``[t, vocabulary]``; of the last position, that of the next token."""
    ids = tokens.tolist()
    done = model.engine.generate(
        input_ids=ids,
        sampling_params={"max_new_tokens": 1, "temperature": 0.0},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=model.vocabulary,
    )["meta_info"]
    rows = [*done["input_top_logprobs"][1:], done["output_top_logprobs"][0]]
    found = np.full((len(rows), model.vocabulary), -np.inf, dtype=np.float32)
    for at, row in enumerate(rows):
        for logprob, token, _ in row:
            found[at, token] = logprob
    return found
