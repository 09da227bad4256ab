"""The chat template of a tokenizer: a conversation as a prompt, and the tokens that end an answer.

Templates are programs of the model's authors, and raise errors of any kind; transformers runs them in a sandbox.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from qtool.models.loaded import LoadedModel
from qtool.models.tokenizer import tokenized
from qtool.system.errors import InputError, first_line

Message = dict[str, str]  # role and content
MARK = "qtool marks where an answer ends"  # an answer that no template writes by itself
DATE = "26 Jul 2024"  # date for templates that print today's, where text must not depend on the day
SAME_DAY = "{% macro strftime_now(format) %}" + DATE + "{% endmacro %}"  # the beginning of a template without today


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, answering: bool = True, today: bool = True
) -> str:
    """Return a conversation as the text that the model reads, with ``answering`` up to where the next answer begins.

    Without ``today`` a template that prints the date prints ``DATE``.

    Raises:
        InputError: the template refuses the conversation, or leaves out its last message.
    """
    template = ("" if today else SAME_DAY) + tokenizer.get_chat_template()
    date: dict[str, Any] = {} if today else {"date_string": DATE}
    parts: Any = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
    fault: Exception | None = None
    for form in (messages, parts):  # templates of multimodal models may read lists of parts only, and skip a text
        try:
            text = str(
                tokenizer.apply_chat_template(
                    form, chat_template=template, tokenize=False, add_generation_prompt=answering, **date
                )
            )
        except Exception as error:
            fault = fault or error
            continue
        if messages[-1]["content"].strip() in text:
            return text
    if fault is not None:
        raise InputError(
            f"the chat template of this model refuses the conversation: {first_line(fault):.300}"
        ) from fault
    raise InputError("the chat template of this model leaves out the last message, so it cannot be answered")


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message], place: str, *, today: bool = True
) -> list[int]:
    """Return the tokens of a conversation, or of a text that is continued as it is; ``place`` says where it is from.

    Raises:
        InputError: the template refuses the conversation, or the tokenizer cannot encode the text.
    """
    if isinstance(prompt, str):
        return list(tokenized(tokenizer, prompt, place)["input_ids"])
    text = rendered(tokenizer, prompt, today=today)
    return list(tokenized(tokenizer, text, place, add_special_tokens=False)["input_ids"])


def ends_of_text(loaded: LoadedModel) -> frozenset[int]:
    """Return the tokens after which a model writes no more.

    They are those of its generation config, the tokenizer's EOS token, and the special token that its chat template
    puts after an answer, which older generation configs lack.
    """
    config = getattr(loaded.model, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    ends = [*(given if isinstance(given, list) else [given]), loaded.tokenizer.eos_token_id, _end_of_turn(loaded)]
    return frozenset(token for token in ends if isinstance(token, int))


def _end_of_turn(loaded: LoadedModel) -> int | None:
    """Return the special token that the chat template puts after an answer; ``None`` if there is none."""
    tokenizer = loaded.tokenizer
    if not tokenizer.chat_template:
        return None
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    try:
        text = rendered(tokenizer, conversation, answering=False)
        after = text.rpartition(MARK)[2].lstrip()
        ids = tokenized(tokenizer, after, "the chat template", add_special_tokens=False)["input_ids"]
    except InputError:
        return None
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else None
