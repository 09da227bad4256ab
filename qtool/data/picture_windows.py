"""Windows of conversations with pictures, made by the model's own processor.

The processor puts placeholders in the place of each picture, as many as the picture has features, and makes what the
model's towers read: pixel values, sizes of pictures, kinds of tokens. A window begins with a conversation that has a
picture, and is filled with whole conversations. The last one is cut at the end of the window, but never before the end
of its last picture. Where no conversation is left that fits, padding fills the window; it comes last, so that in causal
attention no token sees it. Windows have no labels: methods that train on next tokens refuse pictures.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from qtool.data.conversations import PLAIN
from qtool.data.pictures import conversation_of
from qtool.models.chat_template import DATE
from qtool.models.tokenizer import tokenized
from qtool.system import progress
from qtool.system.errors import InputError, first_line

HELD = 16  # most conversations that wait for a window in which their pictures fit
TEXT_ONLY = ("input_ids", "attention_mask", "labels")  # parts of a processor's output that are not about pictures

Inputs = Mapping[str, Tensor]  # arguments of the model's forward


class PictureWindows(NamedTuple):
    """Tokens ``[n, t]`` int64, what the model reads of each window besides, and how many conversations were read."""

    tokens: Tensor
    pictures: tuple[Inputs, ...]
    num_conversations: int


class _Held(NamedTuple):
    """A conversation as the processor reads it, its tokens, and the tokens up to the end of its last picture."""

    text: str
    pictures: list[Image.Image]
    num_tokens: int
    num_needed: int


def pack_pictures(
    records: Iterator[tuple[str, dict[str, Any]]], processor: Any, num: int, length: int, folder: Path
) -> PictureWindows:
    """Return the first ``num`` windows of ``length`` tokens, or fewer if the rows end; ``records`` are (place, row).

    ``processor`` is a processor of transformers. Relative paths of pictures begin at ``folder``.

    Raises:
        InputError: a row is no conversation with or without pictures, or the processor refuses it.
    """
    packer = _Packer(records, processor, length, folder)
    tokens: list[Tensor] = []
    pictures: list[Inputs] = []
    padding = 0
    while len(tokens) < num and (window := packer.window()) is not None:
        ids, inputs = window
        padding += length - ids.shape[1]
        tokens.append(torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=packer.padding_token))
        pictures.append(inputs)
    if packer.num_too_long:
        progress.note(
            f"{packer.num_too_long} conversation(s) were left out: their pictures take up to {packer.longest} tokens, "
            f"and data.seq_len is {length}"
        )
    if padding:
        share = padding / (len(tokens) * length)
        progress.note(f"{share:.0%} of the tokens are padding: of the next conversations none fits where a window ends")
    found = torch.cat(tokens) if tokens else torch.empty(0, length, dtype=torch.int64)
    return PictureWindows(found, tuple(pictures), packer.num_read)


class _Packer:
    """Makes windows one by one from rows."""

    def __init__(
        self, records: Iterator[tuple[str, dict[str, Any]]], processor: Any, length: int, folder: Path
    ) -> None:
        self.records, self.processor, self.length, self.folder = records, processor, length, folder
        self.held: list[_Held] = []
        self.num_read = self.num_too_long = self.longest = 0
        own = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
        self.picture_tokens = torch.tensor([token for token in own if token is not None])
        tokenizer = processor.tokenizer
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.padding_token = next(token for token in known if token is not None and token not in own)

    def window(self) -> tuple[Tensor, Inputs] | None:
        """Return the tokens ``[1, at most length]`` and the other inputs of the next window; ``None`` if rows end."""
        chosen: list[_Held] = []
        filled = 0
        while filled < self.length:
            held = self._next(self.length - filled, text_too=bool(chosen))
            if held is None:
                break
            chosen.append(held)
            filled += held.num_tokens
        while chosen:
            text, shown = "".join(each.text for each in chosen), [x for each in chosen for x in each.pictures]
            inputs = self._encoded(text, shown, "a window of several conversations")
            if self._end_of_pictures(inputs["input_ids"]) <= self.length:
                return inputs["input_ids"][:, : self.length], self._cut(inputs)
            self.held.insert(0, chosen.pop())  # the processor makes more tokens of them together than one by one
        return None

    def _next(self, room: int, *, text_too: bool) -> _Held | None:
        """Take the first conversation whose pictures fit into ``room`` tokens, of those that wait and of the next rows.

        Without ``text_too`` it must have a picture.
        """

        def fits(each: _Held) -> bool:
            return each.num_needed <= room and (text_too or bool(each.pictures))

        for index, each in enumerate(self.held):
            if fits(each):
                return self.held.pop(index)
        while len(self.held) < HELD and (record := next(self.records, None)) is not None:
            held = self._read(*record)
            if held.num_needed > self.length:
                self.num_too_long += 1
                self.longest = max(self.longest, held.num_needed)
            elif fits(held):
                return held
            else:
                self.held.append(held)
        return None

    def _read(self, place: str, row: dict[str, Any]) -> _Held:
        """Return the conversation of a row."""
        self.num_read += 1
        messages, pictures = conversation_of(row, place, self.folder)
        tokenizer = self.processor.tokenizer
        template = getattr(self.processor, "chat_template", None) or tokenizer.chat_template
        if not template:
            template, messages = PLAIN, [{**each, "content": self._as_text(each["content"])} for each in messages]
        try:
            text = str(
                tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, date_string=DATE)
            )
        except Exception as error:  # templates are programs: they raise errors of any kind
            raise InputError(f"{place}: the chat template of this model refuses the conversation: {error}") from error
        ids = self._encoded(text, pictures, place)["input_ids"]
        return _Held(text, pictures, ids.shape[1], self._end_of_pictures(ids))

    def _as_text(self, parts: list[dict[str, str]]) -> str:
        return "".join(part.get("text", getattr(self.processor, "image_token", "<image>")) for part in parts)

    def _encoded(self, text: str, pictures: list[Image.Image], place: str) -> Inputs:
        """Return what the processor makes of a text with pictures; of text alone, what its tokenizer makes."""
        tokenizer = self.processor.tokenizer
        begin = tokenizer.bos_token
        options: dict[str, Any] = {"return_tensors": "pt"}  # Any: arguments of many types
        if begin and text.startswith(begin):
            options["add_special_tokens"] = False
        if not pictures:
            return dict(tokenized(tokenizer, [text], place, **options))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # some processors use old calls of numpy
                found = self.processor(text=[text], images=[pictures], **options)
        except Exception as error:  # processors raise errors of many kinds
            raise InputError(f"{place}: this model's processor refuses it: {first_line(error):.300}") from error
        return {key: value for key, value in found.items() if isinstance(value, Tensor)}

    def _end_of_pictures(self, ids: Tensor) -> int:
        """Return the number of tokens up to the last one that stands for a picture."""
        places = torch.isin(ids[0], self.picture_tokens).nonzero()
        return int(places[-1]) + 1 if len(places) else 0

    def _cut(self, inputs: Inputs) -> Inputs:
        """Return all that is not text, with ``length`` entries of what there is for each token."""
        count = inputs["input_ids"].shape[1]
        found = {}
        for key, value in inputs.items():
            if key in TEXT_ONLY:
                continue
            if value.dim() > 1 and value.shape[:2] == (1, count):
                value = value[:, : self.length]
                missing = value.new_zeros(1, self.length - value.shape[1], *value.shape[2:])
                value = torch.cat([value, missing], 1)
            found[key] = value.contiguous()
        return found
