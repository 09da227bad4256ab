"""Folders of somebody else: what is no regular file of a bounded size is refused before a library opens it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.exporters._folder import WrittenFolder
from qtool.models.folders import check_readable, read_config, resolve
from qtool.models.loading import choose_device, load_model
from qtool.system import reading
from qtool.system.errors import InputError

FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    *("model.safetensors.index.json", "model.safetensors", "another.safetensors", "qtool.json"),
)


def fifo(file: Path) -> None:
    os.mkfifo(file)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def folder_(file: Path) -> None:
    file.mkdir()


def loop(file: Path) -> None:
    file.symlink_to(file.name)


def dangling(file: Path) -> None:
    file.symlink_to("nothing")


KINDS: dict[Callable[[Path], None], str] = {
    fifo: "is a FIFO; a regular file is needed",
    device: "is a device; a regular file is needed",
    folder_: "is a folder; a regular file is needed",
    loop: "cannot be read: Too many levels of symbolic links",
    dangling: "cannot be read: No such file or directory",
}


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to damage."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


@pytest.fixture(scope="session")
def native(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint; only read it."""
    out = tmp_path_factory.mktemp("native") / "q"
    tiny.quantize(llama_folder, out, QuantConfig(group_size=32))
    return out


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_is_refused_and_not_waited_for(
    native: Path, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    copy = tiny.copied(native, tmp_path / "copy")
    (copy / name).unlink(missing_ok=True)
    make(copy / name)
    for read in (lambda: load_model(ModelConfig(path=str(copy)), quantized=True), lambda: NativeCheckpoint(copy)):
        with pytest.raises(InputError) as caught:
            read()
        assert f"{copy / name} {KINDS[make]}" in str(caught.value) or "has no config.json" in str(caught.value)
    with pytest.raises(InputError):
        WrittenFolder(copy)


def test_entries_that_nobody_reads_may_be_anything(folder: Path) -> None:
    fifo(folder / "pipe")
    loop(folder / "notes.md")
    (folder / "large.bin").touch()
    os.truncate(folder / "large.bin", 2**31)
    check_readable(folder)


def test_chat_templates_in_their_folder_are_checked_too(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    fifo(folder / "additional_chat_templates" / "rag.jinja")
    with pytest.raises(InputError, match=r"rag\.jinja is a FIFO"):
        check_readable(folder)


def test_a_small_file_that_is_huge_is_refused(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", reading.LIMIT + 1)
    with pytest.raises(InputError, match=r"tokenizer\.json has 64 MiB; such a file has at most 64 MiB"):
        load_model(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("text", ["{", '{"a":' + "[" * 100_000, "[" * 100_000 + "]" * 100_000, "9" * 5000, "\xff"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_what_is_no_json_is_refused_with_the_name_of_the_file(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=rf"{name} is not (JSON|UTF-8)"):
        load_model(ModelConfig(path=str(folder)))


def test_an_adapter_is_named_as_one(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model", "r": 8}')
    with pytest.raises(InputError, match=r"adapter holds an adapter of org/model \(.*merge it into its model"):
        load_model(ModelConfig(path=str(adapter)))
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter holds an adapter \(adapter_config\.json\), not a whole model"):
        load_model(ModelConfig(path=str(adapter)))


@pytest.mark.parametrize("weight_map", [[], {"a": 1}, {"a": None}, "x", None])
def test_an_index_of_another_form_is_refused(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="is not an index of shards: weight_map should be a mapping"):
        load_model(ModelConfig(path=str(folder)))


def test_an_index_cannot_name_files_outside_the_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(InputError, match=r"lists \.\./x\.safetensors, which is not there"):
        load_model(ModelConfig(path=str(folder)))


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1e\+09; at most 2000 are taken"),
        ({"text_config": {"num_hidden_layers": 5000}}, r"num_hidden_layers is 5e\+03; at most 2000"),
        ({"num_local_experts": 10**7}, r"num_local_experts is 1e\+07; at most 20000"),
        ({"vocab_size": 10**9}, r"asks for 1\.28e"),
        ({"intermediate_size": 10**9}, r"asks for 3\.84e"),
        ({"num_hidden_layers": 1999}, "weights, and the files hold"),
        ({"quantization_config": [1]}, "quantization_config is a list, not an object"),
    ],
)
def test_a_config_that_asks_for_more_than_the_files_hold_is_refused_before_it_is_built(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(folder, changes)
    with pytest.raises(InputError, match=message):
        load_model(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("name", ["builtin:", "builtin:..", "builtin:/etc", "builtin:nothing"])
def test_only_the_built_in_models_are_built_in(name: str) -> None:
    with pytest.raises(InputError, match=r"model\.path: there is no model builtin:"):
        resolve(name)


@pytest.mark.parametrize("path", ["~nosuchuser/x", "$UNSET_HERE/x", "a\0b", "\ud800", "x" * 300])
def test_a_path_that_is_none_is_refused_with_its_key(path: str) -> None:
    with pytest.raises(InputError, match=r"^method\.init_from: "):
        resolve(path, key="method.init_from")


def test_a_model_is_found_below_a_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", str(folder.parent))
    assert resolve("${MODELS}/model") == folder
    assert read_config(resolve("$MODELS/model"))["model_type"] == "llama"


@pytest.mark.parametrize("name", ["meta", "vulkan", "hpu", "cpu:1", "nothing", "", "cuda:99999999999999999999"])
def test_a_device_that_torch_does_not_offer_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^model\.device: "):
        choose_device(name)


@pytest.mark.parametrize("name", ["mps", "xpu", "cuda", "cuda:77"])
def test_an_accelerator_that_is_not_here_is_refused(name: str) -> None:
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is not None and torch.device(name).type == here.type:
        pytest.skip("this machine has one")
    with pytest.raises(InputError, match=rf"^model\.device: {name} was asked for, but torch "):
        choose_device(name)
