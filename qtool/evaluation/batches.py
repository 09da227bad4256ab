"""Batches of lm-eval's requests by tokens: requests of similar length together, as many as fit a number of tokens.

lm-eval sorts requests by length and takes a fixed number of them at a time, which must suit the longest that a model
can read. The questions of most tasks are far shorter.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from lm_eval.models.huggingface import HFLM

MOST_ROWS = 64  # largest number of requests in a batch

# Any in this file: lm-eval carries no types


@cache
def by_tokens(most: int) -> type[Any]:
    """Return lm-eval's class of models with batches of at most ``most`` tokens, padding included, or one request."""

    class ByTokens(HFLM):  # type: ignore[misc]
        """lm-eval's model; ``_batch_scheduler`` is its own hook for the sizes of batches."""

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            """Score ``requests``; whole texts, of which lm-eval chooses the batches itself, pass ``override_bs``."""
            if override_bs is not None:
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            view: Any = self
            fixed, view.batch_size_per_gpu = view.batch_size_per_gpu, "auto"
            try:
                return super()._loglikelihood_tokens(requests, disable_tqdm)
            finally:
                view.batch_size_per_gpu = fixed

        def _batch_scheduler(self, pos: int, requests: Any) -> int:
            """Return the size of the batch that ends with the request ``pos``; 0: none ends there."""
            view: Any = self
            if not view.batch_sizes:  # lm-eval empties it for each set of requests
                lengths = [min(len(context) + len(rest) - 1, view.max_length) for _, context, rest in requests]
                view.batch_sizes = ends_of_batches(lengths, most)
            return int(view.batch_sizes.get(pos, 0))

    return ByTokens


def ends_of_batches(lengths: Sequence[int], most: int) -> dict[int, int]:
    """Return the last place of each batch and its size, for rows of ``lengths`` that fall, padded to the first one's.

    A batch has at most ``most`` tokens and ``MOST_ROWS`` rows, or one row.
    """
    ends, start = {}, 0
    while start < len(lengths):
        size = max(1, min(MOST_ROWS, most // max(1, lengths[start]), len(lengths) - start))
        start += size
        ends[start - 1] = size
    return ends
