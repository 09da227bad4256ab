"""The checks of architectures find planted faults."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import architecture_checks as checks
from helpers.architecture_checks import Trial, Wrong
from helpers.architectures import architectures, make_config
from torch import Tensor

from qtool.blocks.calls import BlockCall
from qtool.data import generated
from qtool.system.errors import InputError

LINEARS = {
    f"model.layers.{block}.{part}"
    for block in (0, 1)
    for part in (
        *(f"self_attn.{each}_proj" for each in "qkvo"),
        *(f"mlp.{each}_proj" for each in ("gate", "up", "down")),
    )
}


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial("llama", tmp_path)


def test_a_base_gives_values_and_takes_them_out_again() -> None:
    rows = architectures()
    assert rows["nemotron_h"].values == rows["nemotron_h_dense"].values | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]
    }
    assert "num_hidden_layers" not in rows["nemotron_h"].values
    assert make_config("gemma3_vl").get_text_config().hidden_size == 64
    assert rows["qwen2_vl"].multimodal
    assert not rows["mllama_text"].multimodal


def test_hidden_states_of_another_window_are_found(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    run = BlockCall.run

    def moved(self: BlockCall, block: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        return run(self, block, hidden, dtype) + 1e-5

    monkeypatch.setattr(BlockCall, "run", moved)
    assert checks.outcome(trial, lambda: checks.states(trial)).startswith("wrong: states that leave model.layers.0 in ")


def test_text_written_without_its_context_is_found(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "find_cache", lambda *args: lambda: {"use_cache": False})
    with pytest.raises(Wrong, match="is not the one that the model writes without a cache"):
        checks.text(trial)


def test_a_linear_that_stays_float_is_found_unless_a_note_names_it(trial: Trial) -> None:
    left = "model.layers.1.mlp.down_proj"
    checks._all_quantized(trial, LINEARS, [])
    with pytest.raises(Wrong, match=rf"{left} \[64, 96\] stays float, and no note names it"):
        checks._all_quantized(trial, LINEARS - {left}, ["model.layers.0.mlp.up_proj stays in floating point"])
    checks._all_quantized(trial, LINEARS - {left}, ["model.layers.0.mlp.down_proj stays in floating point"])


def test_experts_that_stay_float_are_found(tmp_path: Path) -> None:
    trial = Trial("mixtral", tmp_path)
    linears = {name for name in LINEARS if "attn" in name}
    with pytest.raises(Wrong, match=r"% of the blocks stay float without a note, e\.g\. model\.layers\.\d\.mlp\.exp"):
        checks._all_quantized(trial, linears, [])


def test_an_exchanged_weight_is_found(trial: Trial) -> None:
    dense = copy.deepcopy(trial.model)
    checks._same_model(trial, dense, LINEARS)
    with torch.no_grad():
        for name in ("mlp.gate_proj.weight", "input_layernorm.weight"):
            first, second = (dense.get_parameter(f"model.layers.{block}.{name}") for block in (0, 1))
            before = first.clone()
            first.copy_(second)
            with pytest.raises(Wrong, match=f"{name} (stayed float, and differs|is not the quantized weight)"):
                checks._same_model(trial, dense, LINEARS)
            first.copy_(before)


def test_lost_files_and_names_are_found(trial: Trial, tmp_path: Path) -> None:
    with pytest.raises(Wrong, match="does not have the published names"):
        checks._same_files(trial, tmp_path)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("MODEL is too\nlarge"), "refused: MODEL is too large"),
        (Wrong("it differs"), "wrong: it differs"),
        (ValueError("no"), "crash: ValueError: no (test_checks.py:"),
    ],
)
def test_an_outcome_is_one_line(trial: Trial, error: Exception, line: str) -> None:
    def step() -> None:
        raise error

    assert checks.outcome(trial, step).startswith(line)


def test_a_command_that_is_refused_says_why() -> None:
    with pytest.raises(checks.Refused, match=r"nowhere\.yaml"):
        checks.command("ptq", "nowhere.yaml")
