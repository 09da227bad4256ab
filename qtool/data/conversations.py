"""Conversations as tokens: which tokens a model learns, and how conversations are packed into windows.

A conversation is rendered by the tokenizer's own chat template, or, where it has none, in a plain format::

    ### User:
    Name a river in Italy.

    ### Assistant:
    The Po.<end of text>

Only answers are learned: everything from the first character of an assistant's message to the end of what the template
puts after it (the mark that ends the turn). All else is context. ``labels`` hold the token at each position that is
learned, and -100 at all others; the loss shifts them by one.

Packing. A window begins with the beginning of a conversation and is filled with conversations, one after the other. The
last of them is cut at the end of the window and its rest is left out, so that no answer is learned without its
question. There is no padding: methods that only calibrate see nothing but text. As in windows of plain text, a token
can attend to the conversations before its own; the loss never crosses a border, because a conversation begins with
context. A window in which nothing is learned is left out.
"""

import hashlib
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qtool.config.sections import IGNORED
from qtool.data.readers import check_text
from qtool.models.chat_template import DATE, Message
from qtool.models.tokenizer import tokenized
from qtool.system import progress
from qtool.system.errors import InputError

FIELDS = ("messages", "conversations", "instruction")  # fields of a row that make it a conversation, if it has one
ROLES = {"human": "user", "gpt": "assistant"}  # roles of chat templates by their other names in data sets
# chat template of the plain format, for tokenizers that have none
PLAIN = (
    "{% for message in messages %}{{ '' if loop.first else '\n\n' }}"
    "### {{ message.role | capitalize }}:{{ '\n' }}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}"
)


def rendering(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the way in which conversations become text."""
    if not tokenizer.chat_template:
        return "qtool's plain format (### User:, ### Assistant:), since the tokenizer has no chat template"
    digest = hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()
    return f"the tokenizer's chat template (SHA-256 {digest[:12]}...)"


class Packed(NamedTuple):
    """Windows of conversations: ``tokens`` and ``labels`` ``[n, t]`` int64, and how many conversations were read."""

    tokens: Tensor
    labels: Tensor
    num_conversations: int


def is_conversation(row: dict[str, Any]) -> bool:
    """Return whether a row has a field of a conversation."""
    return any(field in row for field in FIELDS)


def messages_of(row: dict[str, Any], place: str) -> list[Message]:
    """Return the messages of a row. ``place`` says for errors where the row is.

    A row has ``messages`` (role, content), ``conversations`` (from, value), or ``instruction`` with ``output`` and
    perhaps ``input``. Answers before the first question are left out: templates refuse them.

    Raises:
        InputError: the row has none of these shapes.
    """
    if "instruction" in row and not row.get("messages") and not row.get("conversations"):
        texts = [row["instruction"], row.get("input") or "", row.get("output")]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{place}: texts 'instruction' and 'output', and perhaps 'input', were expected")
        for text in texts:
            check_text(text, place)
        question = "\n\n".join(text for text in texts[:2] if text)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": texts[2]}]
    field, role, content = (
        ("messages", "role", "content") if row.get("messages") else ("conversations", "from", "value")
    )
    found = row.get(field)
    if not isinstance(found, list) or not found:
        raise InputError(f"{place} has no conversation: a list 'messages', or 'instruction' and 'output', was expected")
    conversation = []
    for each in found:
        if not isinstance(each, dict) or not isinstance(each.get(role), str) or not isinstance(each.get(content), str):
            raise InputError(f"{place}: a message is {each!r:.60}; texts '{role}' and '{content}' were expected")
        check_text(each[role], place)
        check_text(each[content], place)
        conversation.append({"role": ROLES.get(each[role], each[role]), "content": each[content]})
    while conversation and conversation[0]["role"] == "assistant":
        conversation.pop(0)
    if not conversation:
        raise InputError(f"{place}: the conversation has answers only; a question before them was expected")
    return conversation


def encode(conversation: list[Message], tokenizer: PreTrainedTokenizerBase, place: str) -> tuple[list[int], list[bool]]:
    """Return the tokens of one conversation, and for each of them whether it is learned.

    A template may render an answer differently once other messages follow: those of reasoning models drop the thoughts.
    Such an answer is context; the last answer is always learned.

    Raises:
        InputError: the template refuses the conversation, or the tokenizer does not tell where tokens begin.
    """
    if not tokenizer.is_fast:
        raise InputError(
            "data.source holds conversations, and this model's tokenizer is a slow one, which does not tell where its "
            "tokens begin in the text; use plain text, or a model with a tokenizer.json"
        )
    plain = not tokenizer.chat_template

    def render(messages: list[Message], answering: bool = False) -> str:
        template = PLAIN if plain else None
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=answering, date_string=DATE
        )
        return str(text)

    try:
        whole = render(conversation)
        answers = []
        for index, message in enumerate(conversation):
            if message["role"] == "assistant":
                before, until = render(conversation[:index]), render(conversation[: index + 1])
                if whole.startswith(before) and whole.startswith(until):
                    # only as far as both agree: some templates open the thoughts there, and an answer may have none
                    start = _common(render(conversation[:index], answering=True), whole)
                    answers.append(range(start, len(until)))
    except Exception as error:  # templates are programs: they raise errors of any kind
        raise InputError(f"{place}: the chat template of this model refuses the conversation: {error}") from error
    if not answers and conversation[-1]["role"] == "assistant":
        raise InputError(
            f"{place}: this model's chat template changes what came before an answer, so answers cannot be located; "
            "use plain text as data.source"
        )
    encoded = tokenized(tokenizer, whole, place, add_special_tokens=plain, return_offsets_mapping=True)
    learned = [any(start in answer for answer in answers) and start < end for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], learned


def _common(first: str, second: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def pack(
    records: Iterator[tuple[str, dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, num: int, length: int
) -> Packed:
    """Return the first ``num`` windows of ``length`` tokens, or fewer if the text ends; ``records`` are (place, row).

    Raises:
        InputError: a row is no conversation.
    """
    tokens, labels = [], []
    ids: list[int] = []
    learned: list[bool] = []
    num_read = num_empty = 0
    for place, row in records:
        more = encode(messages_of(row, place), tokenizer, place)
        num_read += 1
        ids += more[0]
        learned += more[1]
        if len(ids) < length:
            continue
        window, mask = torch.tensor(ids[:length]), torch.tensor(learned[:length])
        ids, learned = [], []
        if not mask[1:].any():  # the first token of a window is predicted by nothing
            num_empty += 1
            continue
        tokens.append(window)
        labels.append(window.where(mask, IGNORED))
        if len(tokens) == num:
            break
    if num_empty:
        progress.note(f"{num_empty} window(s) of {length} tokens were left out: no answer begins in them")
    if not tokens:
        return Packed(torch.empty(0, length, dtype=torch.int64), torch.empty(0, length, dtype=torch.int64), num_read)
    return Packed(torch.stack(tokens), torch.stack(labels), num_read)
