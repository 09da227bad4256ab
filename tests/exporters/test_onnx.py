"""``onnx``: the graph has the checkpoint's codes bit for bit, and ONNX Runtime computes what torch computes.

Every export is also run before it is kept, so that the contract of all formats (``test_contract.py``) runs each grid.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import families, tiny
from helpers.native_checkpoints import Natives, exported, plain, read_back
from helpers.packed import WEIGHTS, Weight
from helpers.packed_heads import Tables
from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantConfig, QuantSpec
from qtool.exporters import _base, _readback
from qtool.exporters.onnx import building, packing
from qtool.exporters.onnx.marks import Marks, Rows
from qtool.exporters.onnx.reading import logits
from qtool.models.folders import read_config
from qtool.system.errors import InputError, RunError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_genai")
EXACT = 1e-5  # relative to the largest logit: sums in another order
GATED = families.GATED
SOME = ("w2g32-asym", "w3pc", "w3g32-asym", "w8g32")  # grids: with zero points and without, widened and not
PACKED = ("tied w8", "tied w4g16 asym", "both asym", "embedding w4g64, head w8", "head w3, linears skipped")
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ernie4_5": ("Ernie4_5Config", GATED),
    "gemma": ("GemmaConfig", GATED | {"head_dim": 16}),
    "granite": ("GraniteConfig", GATED | {"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "llama 3": (
        "LlamaConfig",
        GATED | {"rope_parameters": LLAMA_3 | {"rope_theta": 5e5, "original_max_position_embeddings": 64}},
    ),
    "phi3": ("Phi3Config", GATED | {"original_max_position_embeddings": 128, "sliding_window": families.WINDOW}),
    "phi3 long": (
        "Phi3Config",
        GATED | {"rope_parameters": LONG | {"rope_theta": 1e4, "original_max_position_embeddings": 64}},
    ),
    **{name: families.CONFIGS[name] for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2")},
    # its embedding is multiplied by the root of its width, which is not whole
    "gemma3": ("Gemma3TextConfig", families.CONFIGS["gemma3"][1] | {"hidden_size": 96}),
}

SLOW = ("ernie4_5", "gemma", "granite", "llama", "phi3", "qwen3")  # a fast one computes in the same way


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return Tables(tmp_path_factory.mktemp("tables"))


def stored(out: Path) -> dict[str, np.ndarray]:
    """Return every tensor of the graph as the ``onnx`` package loads it."""
    return {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(out / "model.onnx").graph.initializer}


def off(out: Path, folder: Path, tokens: Tensor | None = None) -> float:
    """Return the largest difference of ONNX Runtime's logits from torch's, relative to the largest logit."""
    probe = tiny.probe()[:1] if tokens is None else tokens
    with torch.no_grad():
        ours: Tensor = plain(folder)(probe, use_cache=False).logits
    return float((logits(out, probe) - ours).abs().max() / ours.abs().max())


# codes


@WEIGHTS
def test_packing_and_unpacking_give_the_weight_back(weight: Weight) -> None:
    for bits in {packing.MATMUL[weight.quantized.spec.num_bits], packing.GATHER[weight.quantized.spec.num_bits]}:
        for zeros in (True, False):
            parts = {name: each.numpy() for name, each in packing.packed(weight.quantized, bits, zeros=zeros).items()}
            back = packing.unpacked(parts["qweight"], parts["scales"], parts.get("qzeros"), bits)
            assert torch.equal(back, weight.dense)


@pytest.mark.parametrize(
    ("group", "columns", "block"),
    [(-1, 576, 64), (-1, 4096, 256), (128, 1024, 128), (48, 96, 16), (16, 64, 16), (24, 96, None), (-1, 40, None)],
)
def test_blocks_are_the_largest_powers_of_two_that_divide_a_group(group: int, columns: int, block: int | None) -> None:
    assert packing.block_size(QuantSpec(group_size=group), columns) == block


@pytest.mark.parametrize("grid", SOME)
def test_the_file_has_the_codes_scales_and_zero_points_of_the_checkpoint(grid: str, native: Natives) -> None:
    source, held = NativeCheckpoint(native(grid)), stored(native.export("onnx", grid))
    for name, spec in source.specs.items():
        codes, scale, zero_point, _ = source.quantized(name)
        bits = 4 if spec.num_bits == 3 else spec.num_bits
        shift = 2 ** (bits - 1) - spec.middle if spec.symmetric else 0
        flat = held[f"{name}.qweight"].reshape(len(codes), -1)
        found = np.unpackbits(flat, axis=1, bitorder="little").reshape(*codes.shape, bits) @ (1 << np.arange(bits))
        assert np.array_equal(found, codes.numpy() + shift), name
        repeat = held[f"{name}.scales"].shape[1] // scale.shape[1]
        assert np.array_equal(held[f"{name}.scales"], scale.repeat_interleave(repeat, 1).numpy()), name
        assert (f"{name}.qzeros" in held) != spec.symmetric
        if not spec.symmetric:
            stream = np.unpackbits(held[f"{name}.qzeros"], axis=1, bitorder="little")
            count = zero_point.shape[1] * repeat
            zeros = stream[:, : count * bits].reshape(len(codes), count, bits) @ (1 << np.arange(bits))
            assert np.array_equal(zeros, zero_point.repeat_interleave(repeat, 1).numpy()), name


# engines


@pytest.mark.parametrize("grid", SOME)
def test_onnx_runtime_computes_the_same_with_and_without_a_cache(grid: str, native: Natives) -> None:
    out = native.export("onnx", grid)
    assert off(out, native(grid)) < EXACT
    assert off(out, native(grid), tiny.probe()[:1, :5]) < EXACT  # one token, then one by one


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])
def test_onnx_runtime_computes_the_same_model_of_each_family(name: str, tmp_path: Path) -> None:
    kind, values = MODELS[name]
    floats = families.write(getattr(transformers, kind)(**values), tmp_path / "float")
    quant = QuantConfig(num_bits=4, group_size=32, symmetric=False)
    tiny.quantize(floats, tmp_path / "q", quant)
    out = exported(tmp_path / "q", "onnx", tmp_path / "out")
    assert off(out, tmp_path / "q") < EXACT
    assert torch.equal(read_back(out), tiny.logits(plain(tmp_path / "q")))


@pytest.mark.parametrize("case", PACKED)
def test_tables_stay_packed_and_are_computed_the_same(case: str, tables: Tables) -> None:
    folder, out = tables(case), tables.export("onnx", case)
    source, held = NativeCheckpoint(folder), stored(out)
    assert _base.get("onnx").open(out).packed() == set(source.specs)
    kinds = [node.op_type for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node]
    assert kinds.count("GatherBlockQuantized") == len(source.tables.embeddings)
    assert kinds.count("MatMulNBits") == len(source.specs) - len(source.tables.embeddings) + len(source.tables.tied)
    assert len([name for name in held if name.endswith(".qweight")]) == len(source.specs)  # tied ones are stored once
    assert off(out, folder) < EXACT
    assert torch.equal(read_back(out), tables.logits[case])


def test_onnxruntime_genai_writes_the_same_tokens(tmp_path: Path) -> None:
    import onnxruntime_genai

    tiny.quantize(tiny.BUILTIN, tmp_path / "q", QuantConfig(num_bits=4, group_size=32, symmetric=False))
    out = exported(tmp_path / "q", "onnx", tmp_path / "out")
    model, tokens = onnxruntime_genai.Model(str(out)), tiny.load(tiny.BUILTIN).tokenizer("The river runs")["input_ids"]
    assert list(onnxruntime_genai.Tokenizer(model).encode("The river runs")) == tokens
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=24, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    model_of_torch = plain(tmp_path / "q")
    assert isinstance(model_of_torch, transformers.PreTrainedModel)
    ours = tiny.continued(model_of_torch, torch.tensor([tokens]), 24 - len(tokens))
    written = list(generator.get_sequence(0))
    assert written == ours[0, : len(written)].tolist()
    assert len(written) > len(tokens)


# what is refused


def refusal(config: transformers.PreTrainedConfig, tmp_path: Path, **quant: Any) -> str:
    tiny.quantize(families.write(config, tmp_path / "float"), tmp_path / "q", QuantConfig(num_bits=4, **quant))
    with pytest.raises(InputError) as error:
        exported(tmp_path / "q", "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(error.value)


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
def test_rotary_embeddings_that_the_builder_computes_otherwise_are_refused(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    said = refusal(transformers.LlamaConfig(**GATED, rope_parameters=rope), tmp_path, group_size=32)
    assert f"its rotary embedding is scaled ({kind})" in said


def test_families_and_groups_without_a_place_are_refused(tmp_path: Path) -> None:
    said = refusal(families.make_config("olmo2"), tmp_path / "a", group_size=32)
    assert "its model_type is olmo2, and qtool writes ONNX graphs of ernie4_5, " in said
    said = refusal(families.make_config("llama"), tmp_path / "b", group_size=8)
    assert "has groups of 8 input channels, and blocks of ONNX Runtime are powers of two from 16; quantize" in said


def test_another_dtype_is_refused(native: Natives, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its graph computes in float32"):
        exported(native(), "onnx", tmp_path / "out", "bfloat16")


def test_without_its_packages_it_says_what_to_install(native: Natives, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.exporters.onnx.find_spec", lambda name: None if name == "onnxruntime_genai" else name)
    with pytest.raises(InputError, match=r'needs the package onnxruntime-genai; .*pip install "qtool-llm\[onnx\]"'):
        exported(native(), "onnx", native.at / "never")


# what is noticed


def test_an_engine_that_computes_something_else_is_noticed(
    native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _base.get("onnx")._replace(runs=lambda out, tokens: logits(out, tokens.flip(1)))
    with pytest.raises(RunError, match="the engine computes logits that differ by"):
        _readback.read_back(NativeCheckpoint(native()), native.export("onnx"), other, may_round=False)


def test_an_error_of_the_builder_is_said_in_words(
    native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> float:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(building, "_embedding_scale", broken)
    with pytest.raises(RunError, match="builder of onnxruntime-genai stopped at this model: ZeroDivisionError"):
        exported(native(), "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_marks_name_rows_of_views_and_nothing_else() -> None:
    marks = Marks({"a": (6, 4), "b": (8, 3)})
    whole = marks.of("b")
    assert marks.find(whole.numpy(), 1) == Rows("b", 0, 8)
    assert marks.find(whole[2:5].T.numpy(), 0) == Rows("b", 2, 3)
    assert marks.find(marks.of("a").numpy(), 1) == Rows("a", 0, 6)
    assert marks.find(whole.clone().contiguous().numpy(), 1) is None  # a copy may have other inputs
    assert marks.find(np.ones(4, np.float32), 0) is None
    with pytest.raises(AssertionError):  # rows in another order
        marks.find(np.broadcast_to(np.array([[7.0], [6.0]], np.float32), (2, 3)), 1)


def test_the_folder_says_that_the_head_is_tied_or_not(tables: Tables) -> None:
    assert read_config(tables.export("onnx", "tied w8"))["tie_word_embeddings"] is True
    assert read_config(tables.export("onnx", "both w8"))["tie_word_embeddings"] is False
