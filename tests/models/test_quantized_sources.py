"""Models that are published in FP8 or MXFP4 load as the float models that they stand for."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.notes import Notes
from helpers.quantized_sources import (
    COMPRESSED,
    DEEPSEEK,
    E4M3,
    Scaled,
    as_tensor,
    in_blocks,
    in_rows,
    slow_fp8,
    slow_mxfp4,
    write,
    write_shards,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qtool.config.sections import ModelConfig
from qtool.models.folders import read_config
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.quantized_sources import FloatTensors, expanded, expanded_in
from qtool.models.shard_writer import Described, ShardWriter
from qtool.quant.expanding import expand_mxfp4, expand_scaled
from qtool.system import progress
from qtool.system.errors import InputError

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("sources") / "llama")


@pytest.fixture
def deepseek(llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama as DeepSeek publishes models: FP8 in blocks, two shards, scales in either."""
    return write(llama, tmp_path / "fp8", DEEPSEEK, lambda w: in_blocks(w, (40, 48)), "weight_scale_inv", shards=2)


@pytest.fixture
def notes() -> Iterator[Notes]:
    collected = Notes()
    with progress.use(collected):
        yield collected


def loaded(folder: Path, **keys: object) -> LoadedModel:
    return load_model(ModelConfig(path=str(folder), device="cpu", dtype="bfloat16"), **keys)  # type: ignore[arg-type] # flags


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(80, 96), (90, 100), (1, 130)])
def test_blocks_are_expanded_as_the_formula_says(shape: tuple[int, int]) -> None:
    codes, scale = in_blocks(random(*shape), (40, 48))
    found = expand_scaled(codes, scale, (40, 48), "w")
    assert torch.equal(found, slow_fp8(codes, lambda i, j: float(scale[i // 40, j // 48])))


@pytest.mark.parametrize("quantize", [in_rows, as_tensor])
def test_scales_of_rows_and_of_tensors_are_expanded_as_the_formula_says(quantize: Callable[[Tensor], Scaled]) -> None:
    codes, scale = quantize(random(24, 40))
    found = expand_scaled(codes, scale, None, "w")
    assert torch.equal(found, slow_fp8(codes, lambda i, j: float(scale.reshape(-1)[i if scale.numel() > 1 else 0])))


def test_scales_that_are_powers_of_two_are_exponents() -> None:
    codes = random(8, 64).to(E4M3)
    exponents = torch.randint(110, 140, (8, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = expand_scaled(codes, exponents, (1, 32), "w")
    assert torch.equal(found, slow_fp8(codes, lambda i, j: 2.0 ** (int(exponents[i, j // 32]) - 127)))
    assert torch.equal(found, expand_scaled(codes, exponents.view(torch.float8_e8m0fnu), None, "w"))


def test_mxfp4_is_expanded_as_the_formula_and_transformers_say() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 8, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 8, 2), generator=generator, dtype=torch.uint8)
    found = expand_mxfp4(blocks, scales, "w").transpose(1, 2)
    assert torch.equal(found, slow_mxfp4(blocks, scales))
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


def test_four_bit_codes_of_an_fp8_model_are_expanded_as_transformers_does() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (8, 32), generator=generator, dtype=torch.int8)
    scale = torch.randint(110, 140, (8, 2), generator=generator, dtype=torch.uint8)
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    assert torch.equal(expand_scaled(codes, scale, (128, 128), "w"), theirs)


def test_every_expert_of_a_stack_has_its_own_scales() -> None:
    parts = [in_blocks(random(80, 96, seed), (40, 48)) for seed in range(3)]
    found = expand_scaled(torch.stack([c for c, _ in parts]), torch.stack([s for _, s in parts]), (40, 48), "w")
    assert torch.equal(found, torch.stack([expand_scaled(c, s, (40, 48), "w") for c, s in parts]))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_in_fp8_blocks_loads_as_a_bfloat16_model(
    deepseek: Path, llama: Path, streamed: bool, notes: Notes
) -> None:
    model = loaded(deepseek, streamed=streamed)
    stored = tiny.stored(deepseek)
    for name, tensor in model.model.state_dict().items():
        if name in stored and stored[name].dtype == E4M3:
            scale = stored[f"{name}_scale_inv"]
            assert torch.equal(tensor, slow_fp8(stored[name], lambda i, j, s=scale: float(s[i // 40, j // 48]))), name  # type: ignore[misc] # s is bound
        else:
            assert torch.equal(tensor, tiny.stored(llama)[name]), name
    assert model.storage_dtype == torch.bfloat16
    assert set(model.file_dtypes) == set(tiny.stored(llama))
    assert "quantization_config" not in read_config(model.folder)
    assert "14 of 21 tensors are stored in FP8 (fp8); they are expanded to bfloat16" in notes.texts[0]


def test_whole_blocks_load_as_transformers_loads_them(llama: Path, tmp_path: Path) -> None:
    section = DEEPSEEK | {"weight_block_size": [32, 32]}
    folder = write(llama, tmp_path / "fp8", section, lambda w: in_blocks(w, (32, 32)), "weight_scale_inv")
    config = FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    ours = loaded(folder).model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("section", "quantize", "suffix"),
    [
        (COMPRESSED, in_rows, "weight_scale"),
        ({"quant_method": "fbgemm_fp8"}, in_rows, "weight_scale"),
        ({"quant_method": "fp8", "weight_block_size": None}, as_tensor, "weight_scale_inv"),
        ({"quant_method": "fp8", "weight_block_size": None}, as_tensor, "qscale_weight"),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, lambda w: in_blocks(w, (32, 32)), "scale"),
    ],
)
def test_other_ways_to_publish_fp8_load(
    llama: Path,
    tmp_path: Path,
    section: dict[str, object],
    quantize: Callable[[Tensor], Scaled],
    suffix: str,
    notes: Notes,
) -> None:
    more = {"model.layers.0.self_attn.q_proj.input_scale": torch.ones(1)}
    folder = write(llama, tmp_path / "fp8", section, quantize, suffix, more=more)
    found = loaded(folder).model.state_dict()[Q_PROJ]
    weight = tiny.stored(llama)[Q_PROJ]
    assert torch.equal(found, expand_scaled(*quantize(weight), None, "w"))
    assert float((found - weight).abs().max() / weight.abs().max()) < 2**-4
    assert "1 scale(s) of activations or of the KV cache are left out" in notes.texts[0]


def test_gpt_oss_in_mxfp4_has_the_tensors_of_its_float_model(llama: Path, tmp_path: Path) -> None:
    folder = tiny.copied(llama, tmp_path / "oss")
    (folder / "model.safetensors").unlink()
    config = read_config(folder) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    blocks = torch.randint(256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 8, 2), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    bias = torch.ones(3, 8, dtype=torch.bfloat16)
    write_shards({f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": bias}, folder, 2)
    source = FloatTensors(folder)
    assert source.described[name] == Described(torch.bfloat16, (3, 64, 8))
    with expanded_in(tmp_path / "expanded"):
        stored = tiny.stored(expanded("oss", folder, config))
    assert set(stored) == {name, f"{name}_bias"}
    assert torch.equal(stored[name], slow_mxfp4(blocks, scales))


def test_an_expanded_folder_is_used_again_and_a_written_file_is_kept(
    deepseek: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with expanded_in(tmp_path / "expanded"):
        out = expanded("m", deepseek, read_config(deepseek))
        before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
        (out / "config.json").unlink()  # as if it had been stopped before the end
        (out / "model-00002-of-00002.safetensors").unlink()
        assert expanded("m", deepseek, read_config(deepseek)) == out
        after = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
        assert after.keys() == before.keys()
        assert [name for name in before if after[name] == before[name]] == ["model-00001-of-00002.safetensors"]
        monkeypatch.setattr("qtool.models.quantized_sources._write", lambda *args: pytest.fail("written again"))
        expanded("m", deepseek, read_config(deepseek))


def test_a_link_to_a_private_file_stays_a_link(deepseek: Path, tmp_path: Path) -> None:
    private = tmp_path / "private.json"
    private.write_text("{}")
    (deepseek / "vocab.json").symlink_to(private)
    with expanded_in(tmp_path / "expanded"):
        out = expanded("m", deepseek, read_config(deepseek))
    assert (out / "vocab.json").is_symlink()
    assert (out / "tokenizer.json").read_bytes() == (deepseek / "tokenizer.json").read_bytes()


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            without(f"{Q_PROJ}_scale_inv"),
            r"q_proj.weight is stored as torch.float8_e4m3fn, and no tensor with its scale",
        ),
        (
            lambda t: t | {f"{Q_PROJ}_scale_inv": torch.ones(3, 5)},
            r"64 x 64 in FP8, and its scales have the shape \[3, 5\]",
        ),
        (lambda t: t | {f"{Q_PROJ}_scale_inv": torch.full((2, 2), torch.nan)}, r"q_proj.weight holds 4096 NaN"),
    ],
)
def test_damaged_fp8_is_refused(
    llama: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    folder = write(llama, tmp_path / "fp8", DEEPSEEK, lambda w: in_blocks(w, (40, 48)), "weight_scale_inv")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=words):
        loaded(folder)


INT8 = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}}}
MIXED = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "a": {"weights": {"type": "float", "num_bits": 8}},
        "b": {"weights": {"type": "int", "num_bits": 4}},
    },
}


@pytest.mark.parametrize("section", [{"quant_method": "awq"}, {"quant_method": "modelopt"}, INT8, MIXED])
def test_other_quantized_models_are_refused(deepseek: Path, section: dict[str, object]) -> None:
    config = read_config(deepseek) | {"quantization_config": section}
    (deepseek / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"is already quantized \\({section['quant_method']}\\); start from the float"):
        loaded(deepseek)


@pytest.mark.parametrize("quantized", [False, True])
def test_fp8_without_a_section_that_says_so_is_refused(deepseek: Path, quantized: bool) -> None:
    config = read_config(deepseek)
    del config["quantization_config"]
    (deepseek / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"a part of a quantized weight, but its config\.json has no quantization_config"
    ):
        loaded(deepseek, quantized=quantized)


def test_a_disk_without_room_is_said_before_anything_is_written(
    deepseek: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with expanded_in(tmp_path / "expanded"), pytest.raises(InputError, match=r"is expanded to .* MB in .* free"):
        loaded(deepseek)
    assert not list((tmp_path / "expanded").rglob("*.safetensors"))


def test_a_file_written_tensor_by_tensor_reads_back(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": random(3, 5),
        "c": torch.tensor([3, 5]),
        "d": random(2, 3).bfloat16(),
        "e": torch.zeros(0, 4),
    }
    with ShardWriter(tmp_path / "x", {n: Described(t.dtype, tuple(t.shape)) for n, t in tensors.items()}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
        assert not (tmp_path / "x").exists()
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
