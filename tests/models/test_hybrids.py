"""Models whose blocks are of several kinds go through every method, survive the disk, and are exported or refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.hybrids import HYBRIDS, hybrid_config, random_model
from helpers.methods import run
from helpers.native_checkpoints import exported, read_back
from torch import nn
from transformers import AutoModelForCausalLM

from qtool.blocks.job import load_method
from qtool.checkpoints import native, output_folder
from qtool.config import catalog
from qtool.config.quant import QuantConfig
from qtool.models.linears import packed_linears
from qtool.system.errors import InputError

W4 = QuantConfig(num_bits=4, group_size=32)
FLOAT = {  # family -> last names of linears in the blocks that stay in floating point by default
    "qwen3_5": {"in_proj_a", "in_proj_b"},
    "olmo_hybrid": {"a_proj", "b_proj"},
    "lfm3": {"g_proj"},
    "mamba": {"dt_proj"},
    "jamba": {"dt_proj", "x_proj"},
    "xlstm": {"igate_preact", "fgate_preact"},
}
# a first sample; the others are slow
FAST = {"qwen3_5", "lfm2", "nemotron_h", "granite_hybrid"}
GPTQ = {"lfm2", "lfm3", "olmo_hybrid", "qwen3_5", "recurrent_gemma", "xlstm"}  # all widths are multiples of 32
CASES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in HYBRIDS]
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny.moved(random_model(hybrid_config(name)), torch.bfloat16).save_pretrained(made[name])
            tiny.tokenizer().save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, tiny.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_linear_is_quantized_but_those_of_the_rule(name: str, folder: Folder) -> None:
    loaded = tiny.packed(folder(name), W4)
    left = {
        part.rpartition(".")[2]
        for _, block in loaded.blocks()
        for part, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert left == FLOAT.get(name, set())
    assert packed_linears(loaded.model)


@pytest.mark.parametrize("method", catalog.methods())
@pytest.mark.parametrize("name", CASES)
def test_every_method_packs_it_and_the_folder_computes_the_same(
    name: str, method: str, folder: Folder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    loaded = tiny.load(folder(name))
    run(load_method(method), loaded, tokens, W4)
    with output_folder.atomic_folder(tmp_path / "packed", overwrite=False) as partial:
        native.save(partial, loaded, tiny.specs(loaded))
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert set(packed_linears(restored)) == set(packed_linears(loaded.model))
    assert torch.equal(tiny.logits(restored), tiny.logits(loaded.model))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_format_that_holds_it_computes_the_same(
    name: str, symmetric: bool, folder: Folder, tmp_path: Path
) -> None:
    quantized = tiny.quantize(folder(name), tmp_path / "q", W4.model_copy(update={"symmetric": symmetric}))
    expected = tiny.logits(quantized.model)
    for kind in catalog.export_formats():
        if kind == "gguf" or (name not in GPTQ and kind in ("gptq", "gptq-v2", "auto-round")):
            with pytest.raises(InputError, match=r"qtool writes GGUF for|readers need multiples of 32"):
                exported(tmp_path / "q", kind, tmp_path / kind)
            continue
        out = exported(tmp_path / "q", kind, tmp_path / kind)
        if kind == "dense":
            dense = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            assert torch.equal(tiny.logits(dense), expected)
        else:
            assert torch.equal(read_back(out), expected), kind
