"""Every method on the grids of GGUF: what it packs is stored by blocks, and survives the disk and a GGUF file."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import families, tiny
from helpers.methods import run
from helpers.native_checkpoints import exported
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qtool.blocks.job import load_method
from qtool.checkpoints import native, output_folder
from qtool.config import catalog
from qtool.config.quant import QuantConfig
from qtool.models.loaded import LoadedModel
from qtool.quant import affine

TRAINS_SCALES = {"efficientqat": {"init": "minmax", "epochs": 0, "min_steps": 0, "e2e": {"steps": 4, "min_steps": 0}}}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("wide") / "float"
    wide = families.GATED | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    return tiny.load(families.write(LlamaConfig(**wide), folder))


@pytest.fixture
def make_wide(pristine: LoadedModel) -> Callable[[], LoadedModel]:
    return lambda: copy.deepcopy(pristine)


@pytest.mark.parametrize("grid", ["q2_k", "q3_k", "q4_1"])
@pytest.mark.parametrize("name", catalog.methods())
def test_a_method_packs_what_blocks_hold(
    name: str, grid: str, make_wide: Callable[[], LoadedModel], tokens: Tensor, tmp_path: Path
) -> None:
    loaded = make_wide()
    result = run(load_method(name), loaded, tokens, QuantConfig.model_validate({"grid": grid}))
    for linear, weight in result.items():
        assert weight.spec.grid == grid, linear
        stored = affine.stored_scale(weight.scale, weight.spec)
        assert torch.equal(stored, weight.scale), linear
        assert torch.equal(affine.stored_zero_point(weight.zero_point, stored, weight.spec), weight.zero_point), linear
        assert float(weight.codes.float().std()) > 0.3, f"{linear} has hardly any codes"
    with output_folder.atomic_folder(tmp_path / "q", overwrite=False) as partial:
        native.save(partial, loaded, tiny.specs(loaded))
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert torch.equal(tiny.logits(restored), tiny.logits(loaded.model))


@pytest.mark.parametrize("grid", ["q2_k", "q6_k"])
def test_scales_train_end_to_end_on_what_a_file_holds(
    grid: str, make_wide: Callable[[], LoadedModel], tokens: Tensor, tmp_path: Path
) -> None:
    quant, method = QuantConfig.model_validate({"grid": grid}), load_method("efficientqat")
    settings = TRAINS_SCALES["efficientqat"]
    still = run(method, make_wide(), tokens, quant, **settings | {"e2e": {"steps": 0}})
    loaded = make_wide()
    moved = run(method, loaded, tokens, quant, **settings)
    assert all(torch.equal(moved[linear].codes, still[linear].codes) for linear in still)
    assert any(not torch.equal(moved[linear].scale, still[linear].scale) for linear in still)
    with output_folder.atomic_folder(tmp_path / "q", overwrite=False) as partial:
        native.save(partial, loaded, tiny.specs(loaded))
    out = exported(tmp_path / "q", "gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.equal(tiny.logits(model), tiny.logits(loaded.model))
