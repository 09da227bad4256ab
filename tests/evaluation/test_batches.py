"""Batches of lm-eval's requests by tokens: their sizes, and the same scores as in lm-eval's own batches."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.evaluation.batches import MOST_ROWS, by_tokens, ends_of_batches
from qtool.models.loaded import LoadedModel


@given(st.lists(st.integers(1, 300), max_size=200), st.integers(1, 2000))
def test_batches_hold_all_rows_once_within_the_tokens(lengths: list[int], most: int) -> None:
    lengths.sort(reverse=True)
    start = 0
    for end, size in ends_of_batches(lengths, most).items():
        assert end == start + size - 1
        assert size == 1 or size * lengths[start] <= most
        assert size <= MOST_ROWS
        full = size == MOST_ROWS or (size + 1) * lengths[start] > most
        assert full or end == len(lengths) - 1
        start = end + 1
    assert start == len(lengths)


def _requests(seed: int) -> Iterator[Any]:
    """Yield choices that share contexts, some of one token, as (text, context, continuation)."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> list[int]:
        count = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(3, 900, (count,), generator=generator).tolist()

    for index in range(20):
        context = tokens(60)
        for choice in range(3):
            yield (f"{index}", f"{choice}"), context, tokens(2 if index % 3 == 0 else 9)


def test_scores_in_batches_by_tokens_are_those_of_one_request_at_a_time(loaded: LoadedModel) -> None:
    from lm_eval.models.huggingface import HFLM

    sizes: list[torch.Size] = []

    def watched(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append((args[0] if args else kwargs["input_ids"]).shape)

    given = list(_requests(0))
    arguments = {"pretrained": loaded.model, "tokenizer": loaded.tokenizer, "batch_size": 1}
    expected = HFLM(**arguments)._loglikelihood_tokens(given)
    ours = by_tokens(200)(**arguments)
    handle = loaded.model.register_forward_pre_hook(watched, with_kwargs=True)
    found = ours._loglikelihood_tokens(given)
    handle.remove()
    assert ours.batch_size == 1
    assert max(shape.numel() for shape in sizes) <= 200
    assert len(sizes) < len(given) / 3
    for (mine, greedy), (other, other_greedy) in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-4)
        assert greedy == other_greedy
