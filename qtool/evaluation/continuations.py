"""What a model writes after three fixed prompts, beside what its float model writes: the part of a report for the eye.

The prompts are part of qtool, so that they need no data and are the same for every model: questions in the chat
template of a model that has one, beginnings of sentences for any other. Each token is the most likely one, so a run
that is continued reports the same text. The rows are read in one batch without padding: where the prompt of a row is
longer than that of another, its own tokens take the place of the most likely ones. So a model makes at most
``NUM_TOKENS`` forwards, and as many more as the longest prompt has tokens more than the shortest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.config.sections import EvalConfig
from qtool.data.vocabulary import check_ids
from qtool.models import backend
from qtool.models.chat_template import ends_of_text, prompt_ids
from qtool.models.loaded import LoadedModel
from qtool.models.stepping import Begin, continued, find_cache
from qtool.reports.records import Continuation
from qtool.system import progress
from qtool.system.errors import InputError

NUM_TOKENS = 40  # most tokens that are written after a prompt
PLACE = "the prompts of the report"  # where tokens are from, for errors
SENTENCES = ("The city lies on the banks of the river", "In the summer of 1969,", "The first computers were built")
QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the sum of a list.",
)


class _Written(NamedTuple):
    """The tokens that a model wrote after a prompt, and their text."""

    tokens: list[int]
    text: str


def continuations(loaded: LoadedModel, config: EvalConfig, reference: LoadedModel | None) -> tuple[Continuation, ...]:
    """Return what ``loaded`` and its float model ``reference`` write after the first ``config.continuations`` prompts.

    Nothing is returned, and a note says why, if a model cannot read a prompt or has no room in its context.
    """
    if not config.continuations:
        return ()
    prompts = (QUESTIONS if loaded.tokenizer.chat_template else SENTENCES)[: config.continuations]
    with progress.stage(f"continuing {len(prompts)} prompts"):
        try:
            mine = _written(loaded, prompts, config.backend)
            other = None if reference is None else _written(reference, prompts, "exact")
        except InputError as error:
            progress.note(f"the report shows no text of the model: {error}")
            return ()
    if other is None:
        return tuple(
            Continuation(prompt=prompt, text=each.text, num_tokens=len(each.tokens))
            for prompt, each in zip(prompts, mine, strict=True)
        )
    return tuple(
        Continuation(
            prompt=prompt,
            text=each.text,
            num_tokens=len(each.tokens),
            float_text=beside.text,
            num_same=_num_same(each.tokens, beside.tokens),
        )
        for prompt, each, beside in zip(prompts, mine, other, strict=True)
    )


def _num_same(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two rows have in common at their beginning."""
    return next(
        (index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )


@torch.inference_mode()
def _written(loaded: LoadedModel, prompts: Sequence[str], name: str) -> list[_Written]:
    """Return what a model writes after each prompt, its packed linears computing with the backend ``name``.

    Raises:
        InputError: the chat template refuses a prompt, a token is not in the embedding table, or the context is full.
    """
    chat = bool(loaded.tokenizer.chat_template)
    rows = [
        prompt_ids(loaded.tokenizer, [{"role": "user", "content": each}] if chat else each, PLACE, today=False)
        for each in prompts
    ]
    shortest, longest = min(map(len, rows)), max(map(len, rows))
    length = min(longest + NUM_TOKENS, loaded.max_length)
    if not shortest or length <= longest:
        raise InputError(
            f"its prompts have {shortest} to {longest} tokens, and the context of {loaded.path} has {loaded.max_length}"
        )
    given = torch.full((len(rows), longest), -1, dtype=torch.int64)
    for index, row in enumerate(rows):
        given[index, : len(row)] = torch.tensor(row)
    check_ids(given[given >= 0], loaded, PLACE)
    begin = find_cache(loaded, given[:, :shortest], length)  # tried exactly: kernels differ from it in the last digits
    with backend.using(loaded.model, name):
        tokens = _most_likely(loaded, given, length, begin)
    ends = ends_of_text(loaded)
    return [_cut(loaded, tokens[index, len(row) :][:NUM_TOKENS].tolist(), ends) for index, row in enumerate(rows)]


def _most_likely(loaded: LoadedModel, given: Tensor, length: int, begin: Begin | None) -> Tensor:
    """Return tokens ``[n, length]``, on the CPU: those ``given`` ``[n, t]``, and the most likely one for each -1.

    ``begin`` makes the arguments of a cache; ``None``: every step reads all tokens before it.
    """
    start = int((given >= 0).all(0).sum())
    tokens = torch.full((given.shape[0], length), -1, dtype=torch.int64)
    tokens[:, : given.shape[1]] = given
    asked = tokens.to(loaded.device)

    def draw(logits: Tensor, position: int) -> Tensor:
        column = asked[:, position]
        return torch.where(column >= 0, column, logits.argmax(-1))

    positions = progress.track(range(start, length), "tokens", length - start)
    return continued(loaded, tokens, positions, draw, begin)


def _cut(loaded: LoadedModel, tokens: list[int], ends: frozenset[int]) -> _Written:
    """Return the tokens up to the first that ends the text, that one included, and the text."""
    stop = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return _Written(tokens[:stop], str(loaded.tokenizer.decode(tokens[:stop], skip_special_tokens=True)))
