"""A written folder carries the float model's own files byte for byte, and nothing else that lies in its folder."""

import os
from pathlib import Path

import pytest
from helpers import published, tiny

from qtool.checkpoints import side_files
from qtool.checkpoints.files import file_hashes
from qtool.config.quant import QuantConfig
from qtool.system.errors import InputError

CARRIED = (
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "qwen.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
LEFT = (
    "README.md",
    "modeling_x.py",
    "notes.txt",
    "pytorch_model.bin",
    "training_args.bin",
    "qtool.json",
    "deep/vocab.json",
)


def fill(folder: Path) -> None:
    for name in (*CARRIED, *LEFT):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{ }\r\n")  # bytes that no JSON writer would make


def test_the_files_of_tokenizer_processors_and_generation_are_copied_byte_for_byte(tmp_path: Path) -> None:
    floats = tiny.llama(tmp_path / "float")
    fill(floats)
    (floats / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    tiny.quantize(floats, tmp_path / "q", QuantConfig(group_size=32))
    names = (*CARRIED, "tokenizer.json", "tokenizer_config.json")
    assert file_hashes(tmp_path / "q", *names) == file_hashes(floats, *names)
    assert len(file_hashes(floats, *names)) == len(names)
    assert not [name for name in LEFT if (tmp_path / "q" / name).exists()]


def test_the_class_of_the_tokenizer_is_the_sources(tmp_path: Path) -> None:
    floats = tiny.llama(tmp_path / "float")
    published.change_json(floats / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    tiny.quantize(floats, tmp_path / "q", QuantConfig(group_size=32))
    assert '"PreTrainedTokenizerFast"' in (tmp_path / "q" / "tokenizer_config.json").read_text()


def test_a_source_without_a_generation_config_gets_none(tmp_path: Path) -> None:
    floats = tiny.llama(tmp_path / "float")
    (floats / "generation_config.json").unlink()
    tiny.quantize(floats, tmp_path / "q", QuantConfig(group_size=32))
    assert not (tmp_path / "q" / "generation_config.json").exists()


def cached(at: Path) -> Path:
    """Return a snapshot as in the hub's cache: every file is a link into the folder of blobs."""
    blobs, snapshot = at / "models--a--b" / "blobs", at / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    for blob, name in (("one", "tokenizer.json"), ("two", "additional_chat_templates/x.jinja")):
        (blobs / blob).write_text(name)
        (snapshot / name).symlink_to(Path(os.path.relpath(blobs / blob, (snapshot / name).parent)))
    return snapshot


@pytest.mark.parametrize("linked", [False, True], ids=["cache", "link to the cache"])
def test_links_inside_the_hubs_cache_are_followed(linked: bool, tmp_path: Path) -> None:
    folder = cached(tmp_path)
    if linked:
        (tmp_path / "here").symlink_to(folder)
        folder = tmp_path / "here"
    (tmp_path / "out").mkdir()
    names = ["additional_chat_templates/x.jinja", "tokenizer.json"]
    assert side_files.copy(folder, tmp_path / "out") == names
    assert [(tmp_path / "out" / name).read_text() for name in names] == names
    assert not [name for name in names if (tmp_path / "out" / name).is_symlink()]


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "original").mkdir(parents=True)
    (folder / "original" / "t").write_text("x")
    (folder / "tokenizer.model").symlink_to("original/t")
    (tmp_path / "out").mkdir()
    side_files.copy(folder, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "x"


@pytest.mark.parametrize("place", ["secret", "models--a--c/blobs/one", "m2/tokenizer.json"])
@pytest.mark.parametrize("name", ["tokenizer.model", "additional_chat_templates/x.jinja"])
def test_a_link_that_leads_elsewhere_is_refused_and_named(name: str, place: str, tmp_path: Path) -> None:
    folder, target = cached(tmp_path), tmp_path / place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("TOPSECRET")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=rf"{name} is a link to .*{place}, which is outside"):
        side_files.copy(folder, tmp_path / "out")
    assert "TOPSECRET" not in "".join(file.read_text() for file in (tmp_path / "out").rglob("*") if file.is_file())


def test_a_folder_of_templates_that_is_a_link_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "x.jinja").write_text("TOPSECRET")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "chat_templates").symlink_to(tmp_path / "secrets")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"x\.jinja is a link to .*secrets.*outside"):
        side_files.copy(tmp_path / "m", tmp_path / "out")


def test_a_fifo_and_a_file_of_no_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "m" / "tokenizer.model")
    with pytest.raises(InputError, match=r"tokenizer\.model is a FIFO; a regular file is needed"):
        side_files.copy(tmp_path / "m", tmp_path / "out")
    (tmp_path / "m" / "tokenizer.model").unlink()
    with (tmp_path / "m" / "tokenizer.model").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(InputError, match=r"tokenizer\.model is larger than 64 MiB"):
        side_files.copy(tmp_path / "m", tmp_path / "out")
