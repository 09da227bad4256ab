"""A model that only its config describes has the linears, grids and sizes of the loaded one, and its cache's size."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import families, tiny
from transformers import DynamicCache

from qtool.checkpoints.sizes import planned_bytes
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.models.cache_argument import with_cache
from qtool.models.cache_size import BYTES, cache_size
from qtool.models.described import described_model, keep_first, selected
from qtool.models.linears import linear_shapes
from qtool.models.loaded import LoadedModel
from qtool.models.tables import select_tables
from qtool.models.targets import select_targets

QUANT = QuantConfig.model_validate({"group_size": 16, "embedding": {"num_bits": 8}})
NAMES = ("llama", "qwen2", "gemma3", "gpt2", "opt", "smollm", "phi3")


def config_only(folder: Path, to: Path) -> ModelConfig:
    """Copy the config of a model alone, so that no other file can be read."""
    to.mkdir()
    shutil.copy(folder / "config.json", to)
    return ModelConfig(path=str(to))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_alone_tells_what_is_quantized_and_its_size(name: str, tmp_path: Path) -> None:
    folder = families.write(families.make_config(name), tmp_path / "float")
    loaded = tiny.load(folder)
    described = described_model(config_only(folder, tmp_path / "config"))
    targets, tables = select_targets(loaded, QUANT), select_tables(loaded, QUANT)
    specs, found = selected(described, QUANT)
    assert {n: spec for n, spec in specs.items() if spec is not None} == {t.name: t.spec for t in targets}
    assert (found.specs, found.tied, found.shapes) == (tables.specs, tables.tied, tables.shapes)
    assert linear_shapes(described.blocks()) == linear_shapes(loaded.blocks())
    own = {target.name: target.spec for target in targets} | tables.specs
    shapes = linear_shapes(loaded.blocks()) | tables.shapes
    assert planned_bytes(described, own, shapes) == pytest.approx(planned_bytes(loaded, own, shapes), rel=0.01)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("num_tokens", [4, 40])
def test_the_cache_has_the_size_of_one_that_is_filled(name: str, num_tokens: int, tmp_path: Path) -> None:
    """Gemma 3 has a window of 8 tokens in its first layer, and GPT-2 cannot run without values."""
    folder = families.write(families.make_config(name), tmp_path / "float")
    model = tiny.load(folder).model
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, num_tokens, dtype=torch.int64), **with_cache(model, cache))
    layers: Any = cache.layers
    held = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    found = cache_size(described_model(config_only(folder, tmp_path / "config")).model, num_tokens)
    assert found.num_bytes == BYTES * held
    assert found.layers == ({"sliding": 1, "full": 1} if name == "gemma3" else {"full": 2})


def test_the_first_blocks_are_left(tmp_path: Path, llama_folder: Path) -> None:
    loaded: LoadedModel = described_model(config_only(llama_folder, tmp_path / "config"))
    keep_first(loaded, 1)
    assert [name for name, _ in loaded.blocks()] == ["model.layers.0"]
