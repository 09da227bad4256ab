"""Every export carries what the float model's folder has beside weights, and the names that its tensors have there.

One contract over every format and many families: the files of the tokenizer, of chats, of generation and of processors
byte for byte, and in a GGUF file also the chat templates and how the next token is chosen.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import architectures, tiny
from helpers.native_checkpoints import exported

from qtool.checkpoints import side_files
from qtool.checkpoints.files import file_hashes
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config import catalog
from qtool.config.quant import QuantConfig
from qtool.config.sections import ExportConfig
from qtool.exporters import _base
from qtool.exporters._folder import published_names
from qtool.pipelines.export_manifest import files_of
from qtool.pipelines.verify import verify
from qtool.system.errors import RunError

W4 = QuantConfig(num_bits=4, group_size=32)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "do_sample": True, "eos_token_id": [0, 1]}
BESIDE = {  # files of a model folder, beside those that the tiny models have
    "chat_template.jinja": TEMPLATE,
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "generation_config.json": json.dumps(SAMPLING),
    "special_tokens_map.json": "{ }",
    "added_tokens.json": "{ }",
    "preprocessor_config.json": '{"image_processor_type": "CLIPImageProcessor"}',
    "processor_config.json": "{ }",
    "video_preprocessor_config.json": "{ }",
}
FAST = ("llama", "gemma3_vl", "qwen3_moe")
SLOW = (
    "gpt2",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen2_5_vl",
    "idefics3",
    "olmoe",
    "glm4_moe",
    "gpt_oss",
)
# ends of the names of tensors that formats put in the place of .weight
PARTS = re.compile(
    r"\.(weight(_packed|_scale|_zero_point|_shape)?|qweight|qzeros|scales|g_idx|biases|bias)$|_(blocks|scales|bias)$"
)


def native_of(family: str, at: Path) -> Path:
    floats = architectures.write(family, at / "float")
    for name, text in BESIDE.items():
        (floats / name).parent.mkdir(exist_ok=True)
        (floats / name).write_text(text, encoding="utf-8")
    tiny.quantize(floats, at / "native", W4)
    return at / "native"


def stems(names: list[str]) -> set[str]:
    return {PARTS.sub("", name) for name in names}


@pytest.mark.parametrize("family", [*FAST, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def test_every_format_carries_the_neighbours_and_the_published_names(family: str, tmp_path: Path) -> None:
    native, floats = native_of(family, tmp_path), tmp_path / "float"
    source = NativeCheckpoint(native)
    carried = side_files.names(floats)
    assert {*BESIDE, "tokenizer.json", "tokenizer_config.json"} <= set(carried)
    names = published_names(source)
    published = stems([*tiny.stored(floats), *map(names.name, source.float_names())])
    written = 0
    for format in catalog.export_formats():
        out, exporter = tmp_path / format, _base.get(format)
        config = ExportConfig(format=format, path=out)
        if _base.refusal(format, source, config) is not None:
            continue
        out.mkdir()
        exporter.write(source, out, config)
        written += 1
        assert file_hashes(out, *carried) == file_hashes(floats, *carried), format
        stacks = stems(list(exporter.places(names)))  # of a format that holds experts otherwise than published
        assert stems(exporter.open(out).names()) <= published | stacks, format
        if format == "gguf":
            check_metadata(out)
    assert written >= 1


def check_metadata(out: Path) -> None:
    import gguf

    fields: dict[str, Any] = gguf.GGUFReader(out / "model.gguf").fields
    found = {key: field.contents() for key, field in fields.items()}
    assert found["tokenizer.chat_template"] == TEMPLATE
    assert found["tokenizer.chat_template.rag"] == "{{ documents }}"
    assert found["general.sampling.top_k"] == 20
    for key, name in {"temperature": "temp", "top_p": "top_p", "min_p": "min_p"}.items():
        assert found[f"general.sampling.{name}"] == pytest.approx(SAMPLING[key])


def test_a_neighbour_that_is_lost_later_is_found_by_verify(tmp_path: Path) -> None:
    native = native_of("llama", tmp_path)
    for format in ("dense", "gguf"):
        out = exported(native, format, tmp_path / format)
        assert set(BESIDE) <= files_of(out).keys()
        verify(out)
        for name in BESIDE:
            (out / name).rename(tmp_path / "away")
            with pytest.raises(RunError, match=f"{re.escape(name)} is missing"):
                verify(out)
            (tmp_path / "away").rename(out / name)
        (out / "additional_chat_templates" / "new.jinja").touch()
        with pytest.raises(RunError, match=r"additional_chat_templates/new\.jinja is not in the manifest"):
            verify(out)
