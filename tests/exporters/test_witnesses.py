"""Other software reads an export and finds the same weights. Each witness has an environment of its own, named by a
variable; without it the test is skipped.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from helpers import architectures, families, gguf_models, published, tiny
from helpers.gguf_models import ROWS
from helpers.native_checkpoints import GRIDS, MIXED, Natives, exported, plain
from helpers.packed_heads import HEADS, Tables
from helpers.witnesses import witnessed
from torch import Tensor
from torch.nn.functional import cross_entropy

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantConfig
from qtool.exporters.mlx import SWITCH
from qtool.quant.affine import dequantize
from qtool.system.errors import RunError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return Tables(tmp_path_factory.mktemp("tables"))


def by_gptqmodel(out: Path) -> dict[str, Tensor]:
    return witnessed("gptqmodel", out, weights="gptqmodel", logits="gptqmodel")


def by_auto_round(out: Path) -> dict[str, Tensor]:
    return witnessed("auto-round", out, weights="auto_round", logits="transformers")


def by_mlx(out: Path) -> dict[str, Tensor]:
    return witnessed("mlx", out, weights="mlx", logits="mlx")


def check(folder: Path, witness: dict[str, Tensor], tolerance: float) -> None:
    """Assert that weights are equal to the last bit, and logits up to ``tolerance`` times the largest."""
    source = NativeCheckpoint(folder)
    for linear in source.specs:
        assert torch.equal(witness[f"{linear}.weight"], dequantize(*source.quantized(linear))), linear
    with torch.no_grad():
        ours = plain(folder)(witness["tokens"]).logits
    assert torch.allclose(witness["logits"], ours, rtol=0, atol=tolerance * float(ours.abs().max()))


@pytest.mark.parametrize("name", ["gptq", "gptq-v2"])
@pytest.mark.parametrize("grid", ["w2g32", "w3g32", "w4g32", "w8g32", "w4pc", "w2g32-asym", "w3g32-asym", "w4g32-asym"])
def test_gptqmodel_reads_the_same_weights_and_logits(name: str, grid: str, native: Natives) -> None:
    folder, out = native(grid), native.export(name, grid)
    witness = by_gptqmodel(out)
    check(folder, witness, 1e-4)


@pytest.mark.parametrize("grid", ["w2g32", "w3g32-asym", "w4g32", "w4g32-asym", "w4pc", "skipped"])
def test_gptqmodel_reads_the_same_weights_of_awq_and_logits_up_to_float16(grid: str, native: Natives) -> None:
    folder, out = native(grid), native.export("awq", grid)
    witness = witnessed("QTOOL_GPTQMODEL_PYTHON", "gptqmodel 7.x", "witness/witness_awq.py", out)
    check(folder, witness, 2e-3)  # its kernel multiplies in float16


@pytest.mark.parametrize("grid", [*GRIDS, *MIXED])
def test_auto_round_reads_the_same_weights_and_logits(grid: str, native: Natives) -> None:
    folder, out = native(grid), native.export("auto-round", grid)
    witness = by_auto_round(out)
    check(folder, witness, 1e-5)


@pytest.mark.parametrize("name", ["gptq", "gptq-v2", "auto-round"])
@pytest.mark.parametrize("case", HEADS)
def test_packed_heads_are_read_with_the_same_weights_and_logits(name: str, case: str, tables: Tables) -> None:
    folder, out = tables(case), tables.export(name, case)
    if name == "auto-round":
        check(folder, by_auto_round(out), 1e-5)
        return
    witness = by_gptqmodel(out)
    check(folder, witness, 1e-4)


@pytest.mark.parametrize("case", HEADS)
def test_transformers_reads_a_gptq_head_with_the_bits_and_groups_of_the_linears_and_stops_at_others(
    case: str, tables: Tables
) -> None:
    folder, out = tables(case), tables.export("gptq", case)
    if case in ("head as linears", "head asym"):
        witness = witnessed("gptqmodel", out, logits="transformers")
        with torch.no_grad():
            ours = plain(folder)(witness["tokens"]).logits
        assert torch.allclose(witness["logits"], ours, rtol=0, atol=1e-4 * float(ours.abs().max()))
        return
    with pytest.raises(RunError, match="mismatch"):
        witnessed("gptqmodel", out, logits="transformers")


@pytest.mark.parametrize("grid", [*GRIDS, *MIXED])
def test_mlx_lm_reads_the_same_weights_and_logits(grid: str, native: Natives) -> None:
    folder, out = native(grid), native.export("mlx", grid)
    witness = by_mlx(out)
    check(folder, witness, 1e-5)


TABLES: dict[str, tuple[bool, dict[str, object]]] = {  # embeddings and heads: of a tied model, then of another
    "8 bits a row": (True, {"embedding": {"num_bits": 8}}),
    "4 bits": (True, {"embedding": {"num_bits": 4, "group_size": 64, "symmetric": False}}),
    "both": (False, {"embedding": {"num_bits": 8}}),
    "embedding only": (False, {"embedding": {"num_bits": 8, "group_size": 32}, "head": "float"}),
    "head only": (False, {"head": {"num_bits": 3, "symmetric": False}}),
    "differ": (False, {"embedding": {"num_bits": 4, "group_size": 32}, "head": {"num_bits": 8}}),
}


def with_tables(floats: Path, at: Path, tables: dict[str, object]) -> Path:
    """Write a native checkpoint of 4 bits below ``at``, whose embedding or head is quantized too."""
    tiny.quantize(floats, at / "q", QuantConfig.model_validate({"num_bits": 4, "group_size": 32} | tables))
    return at / "q"


@pytest.mark.parametrize("case", TABLES)
def test_mlx_lm_reads_the_same_tables_and_logits(case: str, tmp_path: Path) -> None:
    tied, tables = TABLES[case]
    folder = with_tables(tiny.llama(tmp_path / "float", tied=tied), tmp_path, tables)
    out = exported(folder, "mlx", tmp_path / "mlx")
    check(folder, by_mlx(out), 1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gemma 3", "phi 3"])
def test_mlx_lm_computes_the_same_with_tables_of_other_families(family: str, tied: bool, tmp_path: Path) -> None:
    kind, values, rope, _ = published.MODELS[family]
    config = getattr(transformers, kind)(**values | {"tie_word_embeddings": tied}, rope_parameters=rope)
    folder = with_tables(families.write(config, tmp_path / "float"), tmp_path, TABLES["8 bits a row"][1])
    out = exported(folder, "mlx", tmp_path / "mlx")
    check(folder, by_mlx(out), 1e-5)


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    return float(cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()).exp())


def same_model(folder: Path, witness: dict[str, Tensor]) -> bool:
    """Return whether the perplexities of a witness and ours are equal up to a millionth, and the logits up to 1e-5."""
    tokens, theirs = witness["tokens"].long(), witness["logits"]
    with torch.no_grad():
        ours = plain(folder)(tokens).logits
    near = torch.allclose(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))
    return near and perplexity(theirs, tokens) == pytest.approx(perplexity(ours, tokens), rel=1e-6)


@pytest.mark.parametrize("older", [True, False], ids=["published", "written by transformers 5"])
@pytest.mark.parametrize("name", published.MODELS)
def test_transformers_4_computes_the_same_model(name: str, older: bool, tmp_path: Path) -> None:
    folder = published.quantized(name, tmp_path, older=older)
    out = exported(folder, "dense", tmp_path / "dense")
    # the other names a class of tokenizer of transformers 5
    texts = tiny.PROSE[:1] if older else ()
    witness = witnessed("transformers4", out, logits="transformers", texts=texts)
    assert witness["logits"].isfinite().all()
    assert same_model(folder, witness)
    if older:
        assert witness["text_0"].tolist() == tiny.tokenizer()(tiny.PROSE[0])["input_ids"]


@pytest.mark.parametrize("older", [True, False], ids=["published", "written by transformers 5"])
@pytest.mark.parametrize("name", [name for name in published.MODELS if name != "gpt neox"])
def test_mlx_lm_computes_the_same_model(name: str, older: bool, tmp_path: Path) -> None:
    folder = published.quantized(name, tmp_path, older=older)
    out = exported(folder, "mlx", tmp_path / "mlx")
    assert same_model(folder, by_mlx(out))


# keys of published configs that transformers 5 names otherwise in its own, by family
PUBLISHED_KEYS: dict[str, dict[str, object]] = {
    "qwen3_moe": {"num_experts": 4},
    "exaone_moe": {"is_moe_layer": [False, True]},
}
FLOAT = {"deepseek_v3": {"*.kv_b_proj": {"skip": True}}}  # linears that MLX cannot hold
SCAN = 1e-3  # relative difference of logits by the scan of a state space model, which mlx-lm sums in another order


def mixture(name: str, at: Path) -> Path:
    """Write a native checkpoint of a mixture of experts below ``at``."""
    floats = architectures.write(name, at / "float")
    published.change_json(floats / "config.json", **PUBLISHED_KEYS.get(name, {}))
    quant = QuantConfig.model_validate({"num_bits": 4, "group_size": 32, "overrides": FLOAT.get(name, {})})
    tiny.quantize(floats, at / "q", quant)
    return at / "q"


@pytest.mark.parametrize("name", SWITCH)
def test_mlx_lm_computes_the_same_mixture(name: str, tmp_path: Path) -> None:
    folder = mixture(name, tmp_path)
    out = exported(folder, "mlx", tmp_path / "mlx")
    witness = by_mlx(out)
    with torch.no_grad():
        ours = plain(folder)(witness["tokens"].long()).logits
    tolerance = SCAN if name == "nemotron_h" else 1e-5
    assert torch.allclose(witness["logits"], ours, rtol=0, atol=tolerance * float(ours.abs().max()))
    stacks = [each for each in witness.values() if each.dim() == 3 and each.shape[0] == 4]
    assert len(stacks) >= 2


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3", "nemotron_h", "exaone_moe"])
def test_auto_round_computes_the_same_mixture(name: str, tmp_path: Path) -> None:
    folder = mixture(name, tmp_path)
    out = exported(folder, "auto-round", tmp_path / "auto-round")
    witness = by_auto_round(out)
    with torch.no_grad():
        ours = plain(folder)(witness["tokens"]).logits
    assert torch.allclose(witness["logits"], ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


GGUF_GRIDS = [grid for grid in (*GRIDS, *MIXED) if grid not in ("w8pc-asym", "w8g32-asym", "mixed-asym")]
# relative error of logits: llama.cpp rounds inputs of linears to 8 bits; a wrong order of rows gives more than 1
ACTIVATIONS = 0.05


def logits_of_llama_cpp(out: Path, *, texts: Sequence[str] = (), float32: bool = False) -> dict[str, Tensor]:
    return witnessed("llama.cpp", out, logits="llama_cpp", texts=texts, float32=float32)


def near(folder: Path, witness: dict[str, Tensor]) -> bool:
    with torch.no_grad():
        ours = plain(folder)(witness["tokens"]).logits
    return float((witness["logits"] - ours).norm() / ours.norm()) < ACTIVATIONS


@pytest.mark.parametrize("grid", GGUF_GRIDS)
def test_llama_cpp_computes_the_same_up_to_its_activations(grid: str, native: Natives) -> None:
    folder, out = native(grid), native.export("gguf", grid)
    assert near(folder, logits_of_llama_cpp(out))


@pytest.mark.parametrize("quant", list(ROWS), ids=str)
def test_llama_cpp_computes_the_types_of_256_weights(quant: str, tmp_path: Path) -> None:
    tiny.quantize(tiny.BUILTIN, tmp_path / "q", ROWS[quant])
    out = exported(tmp_path / "q", "gguf", tmp_path / "out")
    assert f"as {quant} (" in (out / "README.md").read_text()
    assert near(tmp_path / "q", logits_of_llama_cpp(out))


@pytest.mark.parametrize("case", TABLES)
def test_llama_cpp_computes_tables_up_to_its_activations(case: str, tmp_path: Path) -> None:
    tied, tables = TABLES[case]
    folder = with_tables(tiny.llama(tmp_path / "float", tied=tied), tmp_path, tables)
    assert near(folder, logits_of_llama_cpp(exported(folder, "gguf", tmp_path / "out")))


@pytest.mark.parametrize("kind", list(ROWS))
def test_llama_cpp_computes_a_table_in_every_type(kind: str, tmp_path: Path) -> None:
    grid = ROWS[kind].model_dump(include={"num_bits", "group_size", "symmetric"})
    folder = with_tables(tiny.BUILTIN, tmp_path, {"embedding": grid})
    out = exported(folder, "gguf", tmp_path / "out")
    assert f"as {kind} (" in (out / "README.md").read_text()
    assert near(folder, logits_of_llama_cpp(out))


@pytest.mark.parametrize("name", list(gguf_models.CHANGES))
def test_llama_cpp_computes_every_family_and_rotary_embedding(name: str, tmp_path: Path) -> None:
    folder = gguf_models.quantized(name, tmp_path)
    assert near(folder, logits_of_llama_cpp(exported(folder, "gguf", tmp_path / "out")))
