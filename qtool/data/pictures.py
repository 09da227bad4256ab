"""Rows with pictures: conversations whose questions show pictures, each as a file, as base64 text or as bytes.

A row is one of these; ``P`` stands for a picture::

    {"messages": [{"role": "user", "content": [{"type": "image", "image": P}, {"type": "text", "text": "..."}]}, ...]}
    {"messages": [{"role": "user", "content": [{"type": "image"}, ...]}, ...], "images": [P]}
    {"conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, ...], "image": P}
    {"image": P, "text": "A caption."}

``{"type": "image_url", "image_url": {"url": P}}`` is another way to write the first. A caption becomes the answer to a
question that is its picture alone. A picture is the path of a file (relative paths begin at the folder of the data
file), a URI ``data:image/png;base64,...``, bytes, or an object with ``bytes`` or ``path``, as Hugging Face data sets
have. Nothing is downloaded.
"""

import base64
import binascii
import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from qtool.data.conversations import is_conversation, messages_of
from qtool.system.errors import InputError, first_line
from qtool.system.reading import read_bytes

COLUMNS = ("images", "image")  # fields of a row that hold its pictures
SOURCES = ("image", "url", "path", "base64", "image_url")  # keys of a part of a message that hold its picture
PLACEHOLDER = "<image>"  # mark of a picture in messages that are plain text
MARK = "\ue000"  # stands for a picture while messages are taken apart; a private character

Part = dict[str, str]


class Conversation(NamedTuple):
    """Messages whose contents are lists of parts, as chat templates of multimodal models read them; and pictures."""

    messages: list[dict[str, Any]]  # role and content
    pictures: list[Image.Image]


def has_pictures(row: dict[str, Any]) -> bool:
    """Return whether a row has a picture."""
    return any(row.get(column) for column in COLUMNS) or any(
        isinstance(part, dict) and part.get("type") in ("image", "image_url")
        for message in _messages(row)
        for part in _parts(message)
    )


def conversation_of(row: dict[str, Any], place: str, folder: Path) -> Conversation:
    """Return the conversation of a row with its pictures; ``folder`` is where relative paths begin.

    Raises:
        InputError: the row has none of the shapes above, or a picture cannot be read; ``place`` says where the row is.
    """
    beside = [each for column in COLUMNS for each in _listed(row.get(column))]
    found: list[Any] = []  # pictures in the order of the messages
    if is_conversation(row):
        field = next((name for name in ("messages", "conversations") if row.get(name)), None)
        plain = {**row, field: [_flat(each, found, beside, place) for each in _messages(row)]} if field else row
    elif beside and isinstance(row.get("text"), str):
        plain = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": row["text"]}]}
    else:
        raise InputError(f"{place} has no conversation, and no picture beside a text 'text'; one of them was expected")
    messages = messages_of(plain, place)
    if beside and not any(MARK in message["content"] for message in messages):
        question = next(message for message in messages if message["role"] == "user")
        question["content"] = MARK * len(beside) + question["content"]
    pictures = [*found, *beside]  # ``_flat`` took those of ``beside`` that messages mark
    marks = sum(message["content"].count(MARK) for message in messages)
    if marks != len(pictures):
        raise InputError(f"{place}: its messages show {marks} picture(s), and the row has {len(pictures)}")
    parts = [{"role": each["role"], "content": _split(each["content"])} for each in messages]
    return Conversation(parts, [load_picture(each, place, folder) for each in pictures])


def load_picture(value: Any, place: str, folder: Path) -> Image.Image:  # Any: whatever a data set has for a picture
    """Return a picture in RGB.

    Raises:
        InputError: it is none of the kinds above, cannot be read, or is no picture.
    """
    content = _content(value, place, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(content)).convert("RGB")
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise InputError(f"{place}: its picture cannot be read: {first_line(error):.200}") from None


def _content(value: Any, place: str, folder: Path) -> bytes:
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise InputError(f"{place}: a picture is {value!r:.60}; a path, a data: URI or bytes were expected")
    if value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except (binascii.Error, ValueError):
            raise InputError(f"{place}: a picture is a data: URI that is not base64") from None
    if value.startswith(("http:", "https:")):
        raise InputError(f"{place}: {value:.100} is on the web; download it, and give the path of the file")
    file = folder / value.removeprefix("file://")
    try:
        return read_bytes(file)
    except FileNotFoundError:
        raise InputError(f"{place}: there is no picture {file}") from None


def _messages(row: dict[str, Any]) -> list[Any]:
    return next((row[name] for name in ("messages", "conversations") if isinstance(row.get(name), list)), [])


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else []


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _flat(message: Any, found: list[Any], beside: list[Any], place: str) -> Any:
    """Return a message as plain text with marks; move its pictures, own ones or those of the row, to ``found``."""
    if not isinstance(message, dict):
        return message
    key = "value" if "value" in message else "content"
    content = message.get(key)
    if isinstance(content, str) and PLACEHOLDER in content and beside:
        found += [beside.pop(0) for _ in range(min(content.count(PLACEHOLDER), len(beside)))]
        return {**message, key: content.replace(PLACEHOLDER, MARK)}
    if not isinstance(content, list):
        return message
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):
            own = next((part[name] for name in SOURCES if part.get(name)), None)
            if own is None and not beside:
                raise InputError(f"{place}: a message shows a picture that the row does not have")
            found.append(own if own is not None else beside.pop(0))
            text += MARK
        else:
            raise InputError(f"{place}: a part of a message is {part!r:.60}; a text or an image was expected")
    return {**message, key: text}


def _split(content: str) -> list[Part]:
    """Return the parts of a text with marks."""
    parts: list[Part] = []
    for index, text in enumerate(content.split(MARK)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts
