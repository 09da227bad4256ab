"""Training of the whole model: the checkpoints that it starts from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.methods import W4, same, train
from torch import Tensor, nn

from qtool.blocks.driver import gather, run_blocks
from qtool.blocks.job import Job, load_method
from qtool.checkpoints import files, native, output_folder
from qtool.config import catalog
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.methods import rtn
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel, Streaming
from qtool.models.loading import load_model
from qtool.system.errors import InputError
from qtool.training import linears
from qtool.training.end_to_end import train_model

W2 = QuantConfig(num_bits=2, group_size=16, symmetric=False)
TRAINED = [name for name in catalog.methods() if load_method(name).command == "qat"]


def written(method: str, folder: Path, out: Path, tokens: Tensor, quant: QuantConfig, **settings: Any) -> LoadedModel:
    """Write a native checkpoint made by another method, and return its model."""
    loaded = tiny.load(folder)
    chosen = load_method(method)
    chosen.run(Job.select(loaded, quant, tokens), chosen.config(**settings))
    with output_folder.atomic_folder(out, overwrite=False) as partial:
        native.save(partial, loaded, tiny.specs(loaded))
        files.write_json(partial / native.MANIFEST, {"format_version": 1})
    return loaded


@pytest.mark.parametrize("other", ["gptq", "awq", "smoothquant"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_starts_at_exactly_the_codes_of_another_method(
    llama: LoadedModel, llama_folder: Path, tmp_path: Path, tokens: Tensor, other: str, symmetric: bool
) -> None:
    """AWQ and SmoothQuant change norms too, and training starts from them."""
    quant = QuantConfig(num_bits=3, group_size=16, symmetric=symmetric)
    before = written(other, llama_folder, tmp_path / "start", tokens, quant)
    found, _ = train(load_method("lsq"), llama, tokens, quant, steps=0, init_from=str(tmp_path / "start"))
    assert same(found, {name: layer.quantized for name, layer in packed_linears(before.model).items()})
    assert torch.equal(tiny.logits(llama.model), tiny.logits(before.model))


@pytest.mark.parametrize(("negative", "share"), [(False, 0.9), (None, 0.88)])
def test_plain_training_starts_near_the_codes_of_another_method(
    llama_folder: Path, tmp_path: Path, tokens: Tensor, negative: bool | None, share: float
) -> None:
    """Its range is that of the start's weights.

    With scales of either sign the larger end is a code exactly, and GPTQ moves the end's weight off it in more groups.
    """
    quant = W4.model_copy(update={"negative_scales": negative})
    before = written("gptq", llama_folder, tmp_path / "start", tokens, quant, range="minmax")
    codes = {name: layer.quantized.codes for name, layer in packed_linears(before.model).items()}
    nearest, _ = train(load_method("qat"), tiny.load(llama_folder), tokens, quant, steps=0)
    start = str(tmp_path / "start")
    found, _ = train(load_method("qat"), tiny.load(llama_folder), tokens, quant, steps=0, init_from=start)
    for name, weight in found.items():
        ours, others = (float((each.codes == codes[name]).float().mean()) for each in (weight, nearest[name]))
        assert ours > share, name
        assert 1 - ours < 0.6 * (1 - others), name


def test_the_teacher_is_the_float_model_wherever_training_starts(
    llama: LoadedModel, llama_folder: Path, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    written("awq", llama_folder, tmp_path / "start", tokens, W4)
    expected = tiny.logits(llama.model)

    def watched(job: Job, teacher: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert torch.equal(tiny.logits(teacher), expected)
        return train_model(job, teacher, *args, **kwargs)

    monkeypatch.setattr(linears, "train_model", watched)
    train(load_method("lsq"), llama, tokens, W4, steps=1, init_from=str(tmp_path / "start"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_bits": 3}, r"has model\.layers\.0\.self_attn\.q_proj on w4g16, the recipe asks for w3g16"),
        (
            {"scale_dtype": "bfloat16", "symmetric": False},
            'has symmetric: true and scale_dtype: "float16", the recipe symmetric: false and scale_dtype: "bfloat16"',
        ),
        (
            {"overrides": {"*.1.mlp.up_proj": {"skip": True}}},
            r"1\.mlp\.up_proj is a linear that the recipe leaves in f",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    llama: LoadedModel, llama_folder: Path, tmp_path: Path, tokens: Tensor, changes: dict[str, Any], match: str
) -> None:
    written("rtn", llama_folder, tmp_path / "start", tokens, W4)
    quant = QuantConfig(**{"num_bits": 4, "group_size": 16} | changes)
    with pytest.raises(InputError, match=f"init_from: .*{match}"):
        train(load_method("lsq"), llama, tokens, quant, init_from=str(tmp_path / "start"))
    with pytest.raises(InputError, match="float model"):
        train(load_method("lsq"), llama, tokens, quant, init_from=str(llama_folder))


@pytest.mark.parametrize(
    ("name", "settings"), [("lsq", {"steps": 0}), ("efficientqat", {"epochs": 0, "e2e": {"steps": 0}})]
)
def test_a_start_with_negative_scales_is_refused_where_scales_are_positive(
    name: str, settings: dict[str, Any], llama: LoadedModel, llama_folder: Path, tmp_path: Path, tokens: Tensor
) -> None:
    """A run that rounds inputs has positive scales by default; one that asks for negative ones takes the start."""
    before = written("rtn", llama_folder, tmp_path / "start", tokens, W4)
    scales = {name: layer.weight_scale for name, layer in packed_linears(before.model).items()}
    config = load_method(name).config(**settings, init_from=str(tmp_path / "start"))
    rounding = {"num_bits": 4, "group_size": 16, "activations": 8}
    job = Job.select(llama, QuantConfig.model_validate(rounding), tokens)
    with pytest.raises(InputError, match=r"init_from: .* has negative scales in .* set quant\.negative_scales: true"):
        load_method(name).run(job, config)
    asked = QuantConfig.model_validate(rounding | {"negative_scales": True})
    load_method(name).run(Job.select(llama, asked, tokens), config)
    found = packed_linears(llama.model)
    assert all(torch.equal(found[name].weight_scale, scale) for name, scale in scales.items())


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("start", ["new", "again"])
def test_gathering_brings_finished_blocks_and_the_rest_together(family: str, tmp_path: Path, start: str) -> None:
    """The blocks were finished by this process, or by an earlier one."""
    folder = tiny.FAMILIES[family](tmp_path / "float")
    expected = tiny.packed(folder, W2)
    kept = tiny.Kept(tmp_path)
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu")
    job = replace(Job.select(load_model(config, streamed=True), W2), workspace=kept)
    assert isinstance(job.loaded.streaming, Streaming)

    def nearest(task: Any) -> None:
        for target in task.targets:
            task.pack(target, rtn.round_to_nearest(target.weight, target.spec, rtn.Config()))

    run_blocks(job, nearest)
    if start == "again":
        job = replace(Job.select(load_model(config, streamed=True), W2), workspace=kept)
    gather(job)
    assert all(tensor.device.type == "cpu" for tensor in job.loaded.model.state_dict().values())
    assert torch.equal(tiny.logits(job.loaded.model), tiny.logits(expected.model))
    assert torch.equal(tiny.logits(job.loaded.float_copy()), tiny.logits(tiny.load(folder).model))
