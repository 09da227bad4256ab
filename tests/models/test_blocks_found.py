"""The decoder blocks are those of the text decoder, before and after packing, and linears that are none are refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import tiny
from helpers.families import COMMON, GATED
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qtool.blocks.job import Job
from qtool.config.quant import QuantConfig
from qtool.config.recipe import Recipe
from qtool.methods import rtn
from qtool.models.linears import decoder_blocks
from qtool.models.loaded import LoadedModel
from qtool.models.targets import select_targets
from qtool.pipelines.quantize import quantize
from qtool.system.errors import InputError

W4 = QuantConfig(num_bits=4, group_size=-1)
MAMBA = COMMON | {"state_size": 4, "num_hidden_layers": 2}


def gemma3_with_vision(layers: int = 5, width: int = 128) -> transformers.Gemma3Config:
    """The config of a Gemma 3 whose vision tower has more layers and weights than its text decoder."""
    text = GATED | {"head_dim": 16, "sliding_window": 8}
    vision = {"hidden_size": width, "intermediate_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4}
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        mm_tokens_per_image=16,
        image_token_index=300,
        boi_token_index=301,
        eoi_token_index=302,
    )


def loaded_from(config: PreTrainedConfig) -> LoadedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return LoadedModel(model, tiny.tokenizer(), "made", Path(), {n: torch.float32 for n, _ in model.named_parameters()})


def test_the_blocks_are_the_text_decoders_before_and_after_they_are_packed() -> None:
    loaded = loaded_from(gemma3_with_vision())
    before = [name for name, _ in loaded.blocks()]
    assert before == ["model.language_model.layers.0", "model.language_model.layers.1"]
    rtn.run(Job.select(loaded, W4), rtn.Config())
    assert [name for name, _ in loaded.blocks()] == before
    assert not any(isinstance(m, nn.Linear) for _, block in loaded.blocks() for m in block.modules())


@pytest.fixture
def vision_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(gemma3_with_vision())
    tiny.moved(model, torch.bfloat16).save_pretrained(tmp_path / "vlm")
    tiny.tokenizer().save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm"


@pytest.mark.parametrize(
    "method",
    [
        {"name": "rtn"},
        {"name": "efficientqat", "min_steps": 1, "epochs": 0.5, "validation_samples": 1, "e2e": {"epochs": 1}},
    ],
    ids=lambda method: str(method["name"]),
)
def test_a_model_with_a_vision_tower_is_quantized_to_its_end(
    vision_folder: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Its shards count one list of blocks: those of the text decoder, and one more for the rest."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(vision_folder)},
            "method": method,
            "quant": {"num_bits": 4, "group_size": 16},
            "data": {"source": str(tiny.text(tmp_path)), "num_samples": 2, "seq_len": 16},
            "output": {"path": str(tmp_path / "out")},
        }
    )
    quantize(recipe)
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    if method["name"] == "rtn":
        assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    names = set(tiny.stored(tmp_path / "out"))
    assert not any("vision_tower" in name and name.endswith("weight_packed") for name in names)
    assert any("language_model" in name and name.endswith("weight_packed") for name in names) or shards


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("Lfm2Config", GATED | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96}),
        ("FalconMambaConfig", MAMBA),
    ],
)
def test_a_kernel_of_a_convolution_is_no_expert(kind: str, values: dict[str, Any]) -> None:
    _, blocks = decoder_blocks(AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values)))
    assert len(blocks) == 2
    assert any(p.dim() > 2 for p in blocks.parameters())


def test_two_stacks_of_blocks_are_refused() -> None:
    loaded = loaded_from(transformers.LlamaConfig(**GATED))
    decoder: Any = loaded.model.get_submodule("model")
    decoder.more = copy.deepcopy(decoder.layers)
    with pytest.raises(InputError, match=r"two stacks of decoder blocks \(model\.layers, model\.more\)"):
        loaded.blocks()


def test_linears_that_blocks_share_are_refused() -> None:
    loaded = loaded_from(transformers.LlamaConfig(**GATED))
    first, second = (block for _, block in loaded.blocks())
    second.set_submodule("mlp", first.get_submodule("mlp"))
    with pytest.raises(InputError, match=r"1\.mlp\.gate_proj has the same weight as model\.layers\.0\.mlp\.gate_proj"):
        select_targets(loaded, W4)


def test_weights_that_blocks_share_are_refused() -> None:
    loaded = loaded_from(transformers.LlamaConfig(**GATED))
    first, second = (block.get_submodule("mlp.up_proj") for _, block in loaded.blocks())
    second.weight = first.weight  # as transformers ties the shared blocks of Zamba
    with pytest.raises(InputError, match=r"1\.mlp\.up_proj has the same weight as model\.layers\.0\.mlp\.up_proj"):
        select_targets(loaded, W4)
