"""Other software, run on an export in an environment of its own by the programs that ``qtool verify`` uses too."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool.exporters._folder import skeleton
from qtool.exporters._outside import Runner, python_for, running, variable

PACKAGES = {  # of each program, those that its environment must have
    "gptqmodel": ("gptqmodel",),
    "auto_round": ("auto-round", "transformers"),
    "mlx": ("mlx", "mlx-lm"),
    "llama_cpp": ("llama-cpp-python",),
    "transformers": ("transformers",),
}


def witnessed(
    name: str,
    out: Path,
    *,
    weights: str = "",
    logits: str = "",
    texts: Sequence[str] = (),
    float32: bool = False,
) -> dict[str, Tensor]:
    """Return what the software ``name`` finds in ``out``; without the variable of its Python, the test is skipped.

    ``weights`` and ``logits`` are the programs that unpack and compute. The result has ``tokens`` ``[2, 64]`` and their
    ``logits``, the weight ``<linear>.weight`` of each packed linear, and the tokens of each text, ``text_0`` and on.
    """
    if variable(name) not in os.environ:
        pytest.skip(f"set {variable(name)} to the Python of an environment with {name}")
    there = python_for(name, None)
    size = skeleton(out).config.get_text_config().vocab_size
    tokens = torch.randint(size, (2, 64), generator=torch.Generator().manual_seed(0))
    file, words = out.with_name(f"{out.name}.tokens.npy"), out.with_name(f"{out.name}.texts.json")
    np.save(file, tokens.numpy())
    words.write_text(json.dumps(list(texts)), encoding="utf-8")
    found: dict[str, Tensor] = {"tokens": tokens}
    if weights:
        with running(name, Runner(weights, PACKAGES[weights]), out, there, "--weights") as (_, records):
            for record in records:
                assert record.array is not None
                found[f"{record.keys['weight']}.weight"] = torch.from_numpy(record.array)
    if logits:
        options = ["--tokens", str(file), "--texts", str(words), *(["--float32"] if float32 else [])]
        rows = []
        with running(name, Runner(logits, PACKAGES[logits]), out, there, *options) as (_, records):
            for record in records:
                if record.array is not None:
                    rows.append(torch.from_numpy(record.array))
                else:
                    found[f"text_{record.keys['text']}"] = torch.tensor(record.keys["tokens"])
        found["logits"] = torch.stack(rows)
    return found
