"""``use_backend``: a model computes with the chosen backend, reports its kernels, and is otherwise unchanged."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.notes import Notes
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import qtool
from qtool.config.quant import QuantConfig
from qtool.config.sections import EvalConfig, ModelConfig
from qtool.evaluation import tasks
from qtool.models import backend
from qtool.models.linears import packed_linears
from qtool.models.loading import load_model
from qtool.pipelines.evaluate import evaluate as run_evaluate
from qtool.system import progress
from qtool.system.errors import InputError

MIXED = QuantConfig.model_validate(
    {
        "num_bits": 4,
        "group_size": 32,
        "symmetric": False,
        "overrides": {
            "*.o_proj": {"num_bits": 8, "symmetric": True},
            "*.q_proj": {"num_bits": 8, "group_size": -1},
            "*.down_proj": {"num_bits": 2},
            "*.up_proj": {"num_bits": 3},
        },
    }
)
SERVING = {"int4 (cpu)": 10, "int8 (cpu)": 2, "int4 pairs (cpu)": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint whose linears need every kind of kernel."""
    at = tmp_path_factory.mktemp("native")
    tiny.quantize(tiny.llama(at / "float"), at / "native", MIXED)
    return at / "native"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.eval()
    return model


def generate(model: PreTrainedModel, tokens: int = 12) -> Tensor:
    return tiny.continued(model, tiny.probe()[:1, :8], tokens)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate_writes_what_the_exact_model_finds_likeliest(folder: Path, dtype: torch.dtype) -> None:
    """Each token is the exact model's first choice, or as likely as that up to the error of the kernels."""
    model = load(folder, dtype)
    found = qtool.use_backend(model, "torch")
    assert (dict(found.kernels), found.exact) == (SERVING, {})
    written = generate(model)
    qtool.use_backend(model, "exact")
    with torch.no_grad():
        logits = model(written[None, :-1]).logits[0, 7:].float()
    chosen = logits.gather(-1, written[8:, None]).squeeze(-1)
    assert (logits.amax(-1) - chosen <= 0.02 * logits.abs().amax()).all()
    assert (logits.argmax(-1) == written[8:]).float().mean() >= 0.75


def test_fast_differs_from_exact_by_little_and_exact_comes_back(folder: Path) -> None:
    model = load(folder)
    prompt = tiny.probe()[:, :9]  # 18 rows
    with torch.no_grad():
        before = model(prompt).logits
        qtool.use_backend(model, "torch")
        fast = model(prompt).logits
        found = qtool.use_backend(model, "exact")
        after = model(prompt).logits
    difference = (fast - before).abs().max() / before.abs().max()
    assert 0 < difference < 0.02
    assert torch.equal(before, after)
    assert (found.num_bytes, backend.held_bytes(model)) == (0, 0)


def test_the_checkpoint_is_the_same_while_kernels_are_active(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    keys, footprint = list(model.state_dict()), model.get_memory_footprint()
    found = qtool.use_backend(model, "torch")
    assert list(model.state_dict()) == keys
    assert model.get_memory_footprint() == footprint
    model.save_pretrained(tmp_path / "again")
    first, second = tiny.stored(folder), tiny.stored(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert found.num_bytes == backend.held_bytes(model) > 0


def test_what_stays_exact_is_counted_and_warned_about(folder: Path, tmp_path: Path) -> None:
    quant = QuantConfig.model_validate({"group_size": 16, "overrides": {"*.mlp.*": {"group_size": 32}}})
    model = tiny.packed(tiny.llama(tmp_path / "float"), quant).model
    with pytest.warns(UserWarning, match="8 by the exact path .*groups of 16 channels are not a multiple of 32"):
        found = qtool.use_backend(model, "torch")
    assert dict(found.kernels) == {"int4 (cpu)": 6}
    ((reason, names),) = found.exact.items()
    assert "groups of 16" in reason
    assert set(names) == {name for name, layer in packed_linears(model).items() if layer.spec.group_size == 16}
    assert "6 linears by int4 (cpu), 8 by the exact path (model.layers.0.self_attn.q_proj, ...: int4: " in str(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qtool.use_backend(load(folder), "torch")
        qtool.use_backend(model, "exact")


def test_what_cannot_be_is_refused(folder: Path, llama_folder: Path) -> None:
    with pytest.raises(InputError, match="'quick' is not known; use one of exact, fast, dense, torch, ort, gemlite"):
        qtool.use_backend(load(folder), "quick")
    with pytest.raises(InputError, match="LlamaForCausalLM has no packed linears"):
        qtool.use_backend(tiny.load(llama_folder).model, "torch")
    with pytest.raises(InputError, match=r"q_proj are not in memory; load the model without offloading"):
        qtool.use_backend(tiny.moved(load(folder), "meta"), "torch")


def test_a_backend_is_used_inside_a_block_only_and_said(folder: Path, llama_folder: Path) -> None:
    model, notes = load(folder), Notes()

    def fail() -> None:
        assert all(layer.kernel for layer in packed_linears(model).values())
        raise ZeroDivisionError

    with progress.use(notes):
        with pytest.raises(ZeroDivisionError), backend.using(model, "torch"):
            fail()
        with backend.using(model, "exact"):
            assert not any(layer.kernel for layer in packed_linears(model).values())
        with backend.using(tiny.load(llama_folder).model, "fast"):
            pass
    assert not any(layer.kernel for layer in packed_linears(model).values())
    serving, none = notes.texts
    assert serving.startswith("backend torch: 10 linears by int4 (cpu), ")
    assert none == "backend fast: LlamaForCausalLM has no packed linears, so this changes nothing"


@pytest.mark.parametrize("name", ["exact", "torch"])
def test_eval_uses_the_exact_path_unless_told_otherwise(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(ModelConfig(path=str(folder), dtype="float32"), quantized=True)
    seen: list[set[bool]] = []

    def watched(*_: object) -> dict[str, list[object]]:
        seen.append({layer.kernel is not None for layer in packed_linears(loaded.model).values()})
        return {"generated": []}

    monkeypatch.setattr(tasks, "_own_tasks", watched)
    config = EvalConfig(tasks=("generated",), **({} if name == "exact" else {"backend": name}))
    tasks.evaluate(loaded, config, None, 0)
    assert seen == [{name == "torch"}]
    assert not any(layer.kernel for layer in packed_linears(loaded.model).values())


def test_the_report_of_an_evaluation_says_which(folder: Path) -> None:
    for name, words in (("exact", "float32 on cpu"), ("torch", "float32 on cpu with torch kernels")):
        config = EvalConfig(tasks=("generated",), limit=1, context=16, backend=name)
        model = ModelConfig(path=str(folder), dtype="float32", device="cpu")
        report = run_evaluate(model, config).report
        assert report.backend == name
        assert ("computed in", words) in report.facts()
