"""Comparing token ids with the rows of a model's embedding table.

A tokenizer may know more tokens than its model: special tokens are added to it without resizing the embeddings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from qtool.models.loaded import LoadedModel
from qtool.system.errors import InputError


def check_ids(tokens: Tensor, loaded: LoadedModel, place: str) -> None:
    """Refuse token ids of any shape that are no row of the model's embedding table; ``place`` says where they are from.

    Raises:
        InputError: names the first such token by its text and its id, and the size of the table.
    """
    size = loaded.num_embeddings
    if not tokens.numel():
        return
    low, high = (int(end) for end in tokens.aminmax())
    if low >= 0 and high < size:
        return
    wrong = int(tokens[(tokens < 0) | (tokens >= size)].flatten()[0])
    raise InputError(
        f"{place}: token {wrong}{_text(wrong, loaded)} has no row in the embedding table of {loaded.path}, which has "
        f"{size} rows (tokens 0 to {size - 1}); use the tokenizer that belongs to this model, remove the token from "
        "the text, or resize the model's embeddings to its tokenizer (resize_token_embeddings) and save it again"
    )


def _text(token: int, loaded: LoadedModel) -> str:
    """Return the text of a token in brackets, or ``""`` where the tokenizer has none."""
    try:
        text = loaded.tokenizer.convert_ids_to_tokens(token)
    except Exception:  # no tokenizer, or one that cannot say; each raises errors of its own kind
        return ""
    return f" ({text!r:.60})" if isinstance(text, str) else ""


@contextmanager
def checked_ids(loaded: LoadedModel, place: str) -> Iterator[None]:
    """Check the token ids of every forward of the model inside the ``with`` block, for text that others tokenize."""

    def check(module: Any, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            check_ids(args[0], loaded, place)

    handle = loaded.model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
