"""What stays in floating point in the decoder blocks: by which rule, what is said of it, and what is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import tiny
from helpers.families import COMMON, GATED, make_config
from helpers.notes import Notes
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qtool.config.quant import QuantConfig
from qtool.evaluation.weights import block_linears
from qtool.models.loaded import LoadedModel
from qtool.models.targets import select_targets
from qtool.models.uncalled import OTHER, READ, UNCALLED, no_plain_linears
from qtool.system import progress
from qtool.system.errors import InputError

MAMBA = COMMON | {"state_size": 16, "time_step_rank": 2}
DELTA = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
DBRX: dict[str, Any] = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": tiny.VOCABULARY,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 1},
}


@contextmanager
def notes() -> Iterator[list[str]]:
    sink = Notes()
    with progress.use(sink):
        yield sink.texts


def loaded_from(config: PreTrainedConfig) -> LoadedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return LoadedModel(model, tiny.tokenizer(), "made", Path(), {n: torch.float32 for n, _ in model.named_parameters()})


def selected(loaded: LoadedModel, **overrides: bool) -> set[str]:
    """Return the last names of the targets; an override is ``pattern=skip``, with ``_`` for ``*.``."""
    patterns = {f"*.{name}": {"skip": skip} for name, skip in overrides.items()}
    targets = select_targets(loaded, QuantConfig(num_bits=4, group_size=-1, overrides=patterns))
    return {target.name.rpartition(".")[2] for target in targets}


@pytest.fixture
def hybrid() -> LoadedModel:
    return loaded_from(transformers.Qwen3_5TextConfig(**GATED | DELTA))


# ----------------------------------------------------------------------------------------- small linears and routers


def test_linears_of_few_rows_stay_in_floating_point_and_one_note_says_so(hybrid: LoadedModel) -> None:
    with notes() as said:
        found = selected(hybrid)
        assert selected(hybrid) == found  # and says nothing again
    assert {"in_proj_a", "in_proj_b"}.isdisjoint(found)
    assert {"in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "down_proj"} <= found
    (line,) = said
    assert line == (
        "linears of fewer than 32 rows stay in floating point: model.layers.*.linear_attn.in_proj_b, "
        "model.layers.*.linear_attn.in_proj_a; quant.overrides with skip: false quantizes them"
    )


def test_an_override_with_skip_false_quantizes_them(hybrid: LoadedModel) -> None:
    with notes() as said:
        assert {"in_proj_a", "in_proj_b"} <= selected(hybrid, in_proj_a=False, in_proj_b=False)
        assert not said
    assert "in_proj_b" not in selected(hybrid, in_proj_a=False)


def test_an_override_that_does_not_say_skip_changes_nothing(hybrid: LoadedModel) -> None:
    overrides = {"*.linear_attn.*": {"num_bits": 8}}
    targets = select_targets(hybrid, QuantConfig(num_bits=4, group_size=-1, overrides=overrides))
    bits = {target.name.rpartition(".")[2]: target.spec.num_bits for target in targets}
    assert "in_proj_a" not in bits
    assert (bits["in_proj_z"], bits["q_proj"]) == (8, 4)


def test_the_rule_touches_no_linear_of_a_plain_decoder() -> None:
    loaded = loaded_from(make_config("llama"))
    with notes() as said:
        assert len(select_targets(loaded, QuantConfig(group_size=16))) == 14
    assert not said


class Experts(nn.Module):
    """Stands for a mixture's fused experts."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(count, 2, 8))


class Mixture(nn.Module):
    """Stands for a layer with a router that is an ordinary linear."""

    def __init__(self, mlp: nn.Module, count: int) -> None:
        super().__init__()
        self.mlp, self.gate, self.experts = mlp, nn.Linear(64, count), Experts(count)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mlp(x) * self.gate(x).sum(-1, keepdim=True)
        return result


def test_a_linear_with_one_row_for_each_expert_beside_it_is_a_router() -> None:
    loaded = loaded_from(make_config("llama"))
    for _, block in loaded.blocks():
        block.set_submodule("mlp", Mixture(block.get_submodule("mlp"), 96))  # the rows of up_proj too, inside
    with notes() as said:
        found = selected(loaded)
    assert "gate" not in found
    (line,) = said
    assert line.startswith("routers (linears with one row for each expert) stay in floating point: model.layers.*.mlp.")
    assert "gate" in selected(loaded, gate=False)


# ------------------------------------------------------------------------------ linears that are not plain linears


def test_a_linear_whose_weight_is_read_without_a_call_stays_in_floating_point() -> None:
    loaded = loaded_from(transformers.MambaConfig(**MAMBA))
    blocks = loaded.blocks()
    names = {f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1)}
    assert no_plain_linears(loaded.model, blocks) == dict.fromkeys(names, READ)
    assert not any("forward" in vars(module) or module._forward_hooks for module in loaded.model.modules())
    with notes() as said:
        assert selected(loaded) == {"in_proj", "x_proj", "out_proj"}
    assert said[0] == (
        "linears that a packed layer cannot stand for (the model's own code reads their weight) stay in floating "
        "point: backbone.layers.*.mixer.dt_proj"
    )
    with pytest.raises(InputError, match=r"dt_proj cannot be quantized: .* reads their weight.*\(and 1 more like it\)"):
        selected(loaded, dt_proj=False)


def test_a_linear_whose_class_computes_something_else_stays_in_floating_point(hybrid: LoadedModel) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Same(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    attention: Any = hybrid.blocks()[0][1].get_submodule("linear_attn")
    attention.in_proj_b.__class__, attention.in_proj_a.__class__ = Doubled, Same
    odd = no_plain_linears(hybrid.model, hybrid.blocks())
    assert odd == {"model.layers.0.linear_attn.in_proj_b": OTHER}


def test_a_linear_that_is_not_called_stays_in_floating_point_only_if_it_is_small_or_asked_for() -> None:
    loaded = loaded_from(make_config("llama"))
    for _, block in loaded.blocks():
        block.get_submodule("mlp").extra = nn.Linear(64, 64)
    assert set(no_plain_linears(loaded.model, loaded.blocks()).values()) == {UNCALLED}
    with pytest.raises(InputError, match=r"\d+ % of the blocks' weights would stay in floating point.*mlp\.extra"):
        selected(loaded)
    assert "extra" not in selected(loaded, extra=True)


def test_a_model_that_changes_its_own_weights_is_refused() -> None:
    config = transformers.RwkvConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, context_length=64
    )
    with pytest.raises(InputError, match="RwkvForCausalLM changes its own weights when it runs"):
        selected(loaded_from(config))


# ------------------------------------------------------------------------------------- matrices that no linear holds


def test_matrices_in_no_linear_are_refused_and_an_override_accepts_them() -> None:
    loaded = loaded_from(transformers.DbrxConfig(**DBRX))
    with pytest.raises(InputError) as refused:
        selected(loaded)
    (line,) = str(refused.value).splitlines()[1:]
    assert "% of the blocks' weights would stay in floating point" in line
    assert "transformer.blocks.*.ffn.experts.mlp.w1, transformer.blocks.*.ffn.experts.mlp.v1" in line
    with pytest.raises(InputError, match=r"floating point.*: transformer\.blocks\.\*\.ffn\.experts\.mlp\.w2;"):
        selected(loaded, w1=True, v1=True)
    with notes() as said:
        assert selected(loaded, w1=True, v1=True, w2=True) == {"Wqkv", "out_proj"}
    assert any(line.endswith("mlp.w2") and "% of the blocks' weights are in no linear" in line for line in said)
    assert block_linears(loaded)["transformer.blocks.0.ffn.experts.mlp.w2"] == (256, 64)  # a record of the report
    with pytest.raises(InputError, match=r"no linear matches '\*\.w1'"):
        selected(loaded, w1=False)
