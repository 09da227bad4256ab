"""Rows with pictures: their shapes, their faults, and the windows that a model's own processor makes of them."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import multimodal, tiny
from helpers.multimodal import ID
from helpers.notes import Notes
from PIL import Image

from qtool.config.sections import DataConfig
from qtool.data import windows
from qtool.data.picture_windows import PictureWindows, pack_pictures
from qtool.data.pictures import conversation_of, has_pictures
from qtool.data.readers import read_records
from qtool.models.loaded import LoadedModel
from qtool.system import progress
from qtool.system.errors import InputError

PICTURE = Image.effect_noise((20, 30), 50).convert("RGB")
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    PICTURE.save(tmp_path / "pictures" / "a.png")
    return tmp_path


def png() -> bytes:
    out = io.BytesIO()
    PICTURE.save(out, "PNG")
    return out.getvalue()


def asked(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "This."}]


A = "pictures/a.png"
ANSWER = {"from": "gpt", "value": "This."}
ROWS: dict[str, dict[str, Any]] = {
    "hugging face": {"messages": asked({"type": "image", "image": A}, TEXT)},
    "openai": {"messages": asked({"type": "image_url", "image_url": {"url": A}}, TEXT)},
    "pictures beside": {"messages": asked(IMAGE, TEXT), "images": [A]},
    "marks": {"conversations": [{"from": "human", "value": "<image>What?"}, ANSWER], "image": A},
    "no marks": {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]}
    | {"image": A},
    "instruction": {"instruction": "What?", "output": "This.", "image": A},
}


@pytest.mark.parametrize("name", ROWS)
def test_each_shape_of_a_row_is_the_same_conversation(folder: Path, name: str) -> None:
    assert has_pictures(ROWS[name])
    messages, pictures = conversation_of(ROWS[name], "here", folder)
    assert messages == [
        {"role": "user", "content": [IMAGE, TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
    ]
    assert [each.tobytes() for each in pictures] == [PICTURE.tobytes()]


def test_a_caption_is_the_answer_to_its_picture(folder: Path) -> None:
    messages, pictures = conversation_of({"images": [A, A], "text": "Two."}, "here", folder)
    assert [each["content"] for each in messages] == [[IMAGE, IMAGE], [{"type": "text", "text": "Two."}]]
    assert len(pictures) == 2


@pytest.mark.parametrize(
    "value",
    [
        lambda folder: A,
        lambda folder: str(folder / A),
        lambda folder: f"file://{folder / A}",
        lambda folder: "data:image/png;base64," + base64.b64encode(png()).decode(),
        lambda folder: png(),
        lambda folder: {"bytes": png(), "path": None},
        lambda folder: {"path": A},
    ],
)
def test_a_picture_is_a_file_text_or_bytes(folder: Path, value: Callable[[Path], Any]) -> None:
    (picture,) = conversation_of({"image": value(folder), "text": "x"}, "here", folder).pictures
    assert picture.mode == "RGB"
    assert picture.tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"image": "b.png", "text": "x"}, r"here: there is no picture .*b\.png"),
        ({"image": "https://example.org/a.png", "text": "x"}, "is on the web; download it"),
        ({"image": "data:image/png;base64,!", "text": "x"}, "not base64"),
        ({"image": b"not a picture", "text": "x"}, "here: its picture cannot be read"),
        ({"image": png()[:60], "text": "x"}, "here: its picture cannot be read"),
        ({"image": 3, "text": "x"}, "a picture is 3"),
        ({"image": A}, "has no conversation, and no picture beside a text"),
        ({"messages": asked(IMAGE, IMAGE), "images": [A]}, "shows a picture that the row does not have"),
        ({"messages": asked(IMAGE), "images": [A, A]}, r"show 1 picture\(s\), and the row has 2"),
        ({"messages": asked({"type": "video", "video": A})}, "a part of a message is"),
    ],
)
def test_a_fault_names_the_row(folder: Path, row: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        conversation_of(row, "here", folder)
    assert str(error.value).startswith("here")


def test_rows_of_text_have_no_pictures() -> None:
    assert not has_pictures({"text": "x"})
    assert not has_pictures({"messages": [{"role": "user", "content": "<image>"}]})
    assert not has_pictures({"messages": asked(TEXT), "image": None})


# ------------------------------------------------------------------------------------------------------- windows


def packed(folder: Path, processor: Any, rows: list[dict[str, Any]], num: int, length: int) -> PictureWindows:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return pack_pictures(read_records(file), processor, num, length, folder)


CAPTION = {"image": A, "text": tiny.PROSE[0]}  # 62 tokens, of which 4 are a picture's
SHORT = {"image": A, "text": "It."}  # 22 tokens, of which the sixth to the ninth are a picture's
PLAIN = {"instruction": "What?", "output": tiny.PROSE[1]}


def test_a_window_is_what_the_processor_makes_of_its_conversations(folder: Path) -> None:
    processor = multimodal.processor("llava")
    found = packed(folder, processor, [CAPTION] * 4, 2, 100)
    assert found.tokens.shape == (2, 100)
    text = f"user: <image>{tiny.END}assistant: {tiny.PROSE[0]}{tiny.END}"
    own = processor(text=[text * 2], images=[[PICTURE] * 2], return_tensors="pt")
    count = int((found.tokens[0] == ID["<image>"]).sum())
    assert count == 8
    assert torch.equal(found.tokens[0], own["input_ids"][0, :100])
    assert torch.equal(found.pictures[0]["pixel_values"], own["pixel_values"])
    assert found.pictures[0].keys() == {"pixel_values"}


def test_a_picture_is_never_cut_and_padding_is_said(folder: Path) -> None:
    processor = multimodal.processor("llava")
    notes = Notes()
    with progress.use(notes):
        found = packed(folder, processor, [SHORT] * 8, 3, 26)
    for tokens, pictures in zip(found.tokens, found.pictures, strict=True):
        assert int((tokens == ID["<image>"]).sum()) == 4 * len(pictures["pixel_values"])
    assert [tokens[-4:].tolist() for tokens in found.tokens] == [[0] * 4] * 3
    assert any("15% of the tokens are padding" in note for note in notes.texts)


def test_rows_of_text_fill_windows_and_never_begin_one(folder: Path) -> None:
    found = packed(folder, multimodal.processor("llava"), [PLAIN, SHORT, PLAIN, SHORT], 2, 40)
    assert len(found.tokens) == 2
    assert all((tokens == ID["<image>"]).any() for tokens in found.tokens)
    assert found.num_conversations == 4


def test_a_picture_that_is_longer_than_a_window_is_left_out_with_a_note(folder: Path) -> None:
    notes = Notes()
    with progress.use(notes):
        found = packed(folder, multimodal.processor("llava"), [CAPTION], 1, 4)
    assert not len(found.tokens)
    assert any("1 conversation(s) were left out: their pictures take up to" in note for note in notes.texts)


def test_what_there_is_for_each_token_has_the_length_of_the_window(folder: Path) -> None:
    processor = multimodal.processor("paligemma")
    for length in (16, 80):
        found = packed(folder, processor, [CAPTION], 1, length)
        assert found.pictures[0]["token_type_ids"].shape == (1, length)
        assert "labels" not in found.pictures[0]


def test_calibration_asks_the_processor_only_for_multimodal_models(folder: Path, llama: LoadedModel) -> None:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [CAPTION] * 4)))
    data = DataConfig(source=str(file), num_samples=1, seq_len=16)
    notes = Notes()
    with progress.use(notes):
        text = windows.calibration(data, llama, 0)
    assert not text.pictures
    assert any("reads text only: the pictures" in note for note in notes.texts)


def test_the_hash_of_windows_has_their_pictures() -> None:
    tokens, pixels = torch.arange(6).view(1, 6), torch.ones(1, 3)
    plain = windows.token_hash(tokens)
    assert windows.token_hash(tokens, None, ()) == plain
    hashes = {windows.token_hash(tokens, None, ({"pixel_values": x},)) for x in (pixels, 2 * pixels, pixels.view(3, 1))}
    assert len(hashes | {plain}) == 4
