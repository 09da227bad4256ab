"""The windows of C4 on which papers of the GPTQ line measure perplexity, drawn at random from long documents.

One generator, Python's with seed 0, draws the index of a document of the first validation file until the document has
more tokens than a window, and then the first token of the window in it; 256 windows are drawn so (arXiv 2210.17323 and
its successors, EfficientQAT among them). A document can be drawn again. Bounds of both draws are inclusive, as
``random.randint`` has them, and the last token of a document is in no window.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qtool.data.sources import c4_validation
from qtool.models.loaded import LoadedModel
from qtool.models.tokenizer import tokenized
from qtool.system import progress
from qtool.system.errors import InputError

C4 = "c4"  # name of the task
NUM_WINDOWS = 256
SEED = 0  # seed of the draws: the definition of the task fixes it, and the seed of a recipe does not change it


def c4_windows(loaded: LoadedModel, length: int, limit: int | None) -> Tensor:
    """Return the windows ``[n, length]`` int64 of C4: 256, or the first ``limit`` of them.

    Each document is tokenized by itself, with the special tokens that the tokenizer adds.

    Raises:
        UnreachableError: C4's validation file is neither on this machine nor reachable on the hub.
        InputError: no document is longer than a window.
    """

    def tokens(text: str) -> Any:
        return tokenized(loaded.tokenizer, text, C4)["input_ids"]

    return drawn(list(c4_validation()), min(limit or NUM_WINDOWS, NUM_WINDOWS), length, tokens)


def drawn(documents: Sequence[str], count: int, length: int, tokens: Callable[[str], Sequence[int]]) -> Tensor:
    """Return ``count`` windows ``[count, length]`` int64, each a random part of a random document.

    Raises:
        InputError: no document has more than ``length`` tokens.
    """
    generator = random.Random(SEED)
    short: set[int] = set()  # documents that are known to be too short
    windows = []
    for _ in progress.track(range(count), f"drawing windows of {C4}", count):
        ids: Sequence[int] = ()
        while len(ids) <= length:
            if len(short) == len(documents):
                raise InputError(
                    f"{C4}: none of the {len(documents)} document(s) has more than {length} tokens, the length of a "
                    "window; lower eval.context, or give C4's own validation file"
                )
            index = generator.randint(0, len(documents) - 1)
            if index not in short:
                ids = tokens(documents[index])
                if len(ids) <= length:
                    short.add(index)
        start = generator.randint(0, len(ids) - length - 1)
        windows.append(torch.tensor(ids[start : start + length], dtype=torch.int64))
    return torch.stack(windows)
