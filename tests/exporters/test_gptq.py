"""GPTQ folders of models with linears in floating point, and with biases that float16 does not hold."""

import re
from pathlib import Path

import pytest
import torch
from helpers import architectures, tiny
from helpers.native_checkpoints import Q_PROJ, exported, plain, read_back

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantConfig
from qtool.exporters import _base
from qtool.models.folders import read_config
from qtool.system.errors import InputError


def left_out(section: dict[str, dict[str, object]], name: str) -> bool:
    """True if both kinds of readers leave ``name`` in floating point."""
    by_pattern = any(re.match(pattern.removeprefix("-:"), name) for pattern in section["dynamic"])
    (kept,) = section["modules_in_block_to_quantize"]
    by_name = not any(part in name for part in kept)
    assert by_pattern == by_name
    return by_pattern


def test_linears_left_in_floating_point_are_named_for_every_reader(tmp_path: Path) -> None:
    architectures.write("qwen3_5_text", tmp_path / "float")
    model = tiny.load(tmp_path / "float").model
    tiny.quantize(tmp_path / "float", tmp_path / "q", QuantConfig(group_size=32))
    out = exported(tmp_path / "q", "gptq", tmp_path / "out")
    section = read_config(out)["quantization_config"]
    inside = {name for name, part in model.named_modules() if ".layers." in name and isinstance(part, torch.nn.Linear)}
    specs = NativeCheckpoint(tmp_path / "q").specs
    assert {name for name in inside if left_out(section, name)} == inside - set(specs)
    assert torch.equal(read_back(out), tiny.logits(plain(tmp_path / "q")))


def test_a_linear_left_in_one_block_only_is_refused(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=32, overrides={"model.layers.1.mlp.up_proj": {"skip": True}})
    tiny.quantize(tiny.llama(tmp_path / "float"), tmp_path / "q", quant)
    with pytest.raises(InputError, match=r"1\.mlp\.up_proj is left in floating point, and a linear of that name in an"):
        exported(tmp_path / "q", "gptq", tmp_path / "out")


def test_a_plain_folder_names_none(tmp_path: Path) -> None:
    tiny.quantize(tiny.llama(tmp_path / "float"), tmp_path / "q", QuantConfig(group_size=32))
    section = read_config(exported(tmp_path / "q", "gptq", tmp_path / "out"))["quantization_config"]
    assert not {"dynamic", "modules_in_block_to_quantize"} & section.keys()


@pytest.mark.parametrize("name", ["gptq", "auto-round"])
def test_a_bias_that_float16_does_not_hold_keeps_its_dtype(name: str, tmp_path: Path) -> None:
    floats = tiny.llama(tmp_path / "float", bias=True)
    bias = tiny.stored(floats)[f"{Q_PROJ}.bias"]
    bias[3] = 1e-6  # below the normal numbers of float16
    tiny.change(floats, **{f"{Q_PROJ}.bias": bias})
    tiny.quantize(floats, tmp_path / "q", QuantConfig(group_size=32))
    opened = _base.get(name).open(exported(tmp_path / "q", name, tmp_path / "out"))
    assert torch.equal(opened.tensor(f"{Q_PROJ}.bias"), bias)
    other = Q_PROJ.replace("q_proj", "k_proj")
    small = tiny.stored(floats)[f"{other}.bias"]
    exact = torch.equal(small.half().to(small.dtype), small)
    assert opened.tensor(f"{other}.bias").dtype == (torch.float16 if exact else torch.bfloat16)
