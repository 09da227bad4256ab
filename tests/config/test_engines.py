"""The table of engines: every pair of an engine and a format has a verdict, and every refusal says what to change."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.config import catalog
from qtool.config.engines import ENGINES, FORMATS, READS, formats_of, load_commands, reads
from qtool.config.loadable import INT8, Weights, best, verdict, verdicts, version_note
from qtool.config.quant import QuantSpec

PAIRS = [*product(ENGINES, FORMATS)]
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def weights(spec: QuantSpec, **changes: QuantSpec | None) -> Weights:
    """One block with linears of the grid ``spec``, but for some by name."""
    grids = dict.fromkeys(NAMES, spec) | changes
    return Weights({f"model.layers.0.self_attn.{name}": grid for name, grid in grids.items()})


specs = st.builds(
    QuantSpec,
    num_bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 16, 32, 64, 100, 128, 256]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)


@pytest.mark.parametrize(("engine", "format"), PAIRS)
def test_every_pair_is_loaded_or_refused_with_what_to_do(engine: str, format: str) -> None:
    for bits, group, symmetric in product((2, 3, 4, 8), (-1, 32, 64, 128, 256), (True, False)):
        found = verdict(engine, format, weights(QuantSpec(num_bits=bits, group_size=group, symmetric=symmetric)))
        assert found.loads == (not found.reasons)
        assert all(("give quant." in reason) or ("; it reads " in reason) for reason in found.reasons)
        assert found.loads <= (reads(engine, format) is not None)


@given(specs)
def test_the_best_format_is_loaded_if_any_is_that_needs_no_request(spec: QuantSpec) -> None:
    for engine in ENGINES:
        found = best(engine, weights(spec))
        rows = [row for row in READS if row.engine == engine and not row.on_request]
        assert found.loads == any(verdict(engine, row.format, weights(spec)).loads for row in rows)


@given(specs)
def test_dense_is_loaded_by_every_engine_that_reads_it_and_native_holds_every_grid(spec: QuantSpec) -> None:
    found = {(each.engine, each.format): each.loads for each in verdicts(weights(spec))}
    assert all(loads for (_, format), loads in found.items() if format in ("dense", "native"))


@pytest.mark.parametrize("engine", ENGINES)
def test_linears_that_become_one_matrix_need_one_grid_where_the_engine_makes_it(engine: str) -> None:
    spec = QuantSpec(num_bits=4, group_size=32)
    mixed = weights(spec, o_proj=spec.model_copy(update={"num_bits": 8}))
    split = weights(spec, k_proj=spec.model_copy(update={"num_bits": 8}))
    floats = weights(spec, v_proj=None)
    format = formats_of(engine)[0]
    assert verdict(engine, format, mixed).loads
    for each in (split, floats):
        found = verdict(engine, format, each)
        assert found.loads != ENGINES[engine].fused
        assert all("q_proj, k_proj and v_proj become one matrix" in reason for reason in found.reasons)


def test_tables_activations_and_zero_points_are_refused_by_their_keys() -> None:
    spec = QuantSpec(num_bits=4, group_size=32)
    table = QuantSpec(num_bits=8, group_size=-1)
    with_table = Weights(weights(spec).linears, embedding=table)
    assert verdict("vllm", "compressed-tensors", with_table).reasons == (
        "no quantized embedding: give quant.embedding: float",
    )
    assert verdict("llama.cpp", "gguf", with_table).loads
    assert "quant.head: float" in verdict("sglang", "compressed-tensors", Weights({}, head=table)).reasons[0]
    int8 = spec.model_copy(update={"activations": INT8})
    assert verdict("vllm", "compressed-tensors", weights(int8)).loads
    assert "leave out quant.activations" in verdict("llama.cpp", "gguf", weights(int8)).reasons[0]
    floating = QuantSpec(symmetric=False, float_zero=True)
    assert "quant.float_zero: false" in verdict("mlx", "mlx", weights(floating)).reasons[0]
    assert verdict("transformers", "native", weights(floating)).loads
    cached = spec.model_copy(update={"kv_cache": 8})
    assert best("transformers", weights(cached)).format == "native"


def test_groups_of_whole_rows_are_as_large_as_the_rows() -> None:
    spec = QuantSpec(num_bits=4, group_size=-1)
    names = weights(spec).linears
    for columns, loads in ((64, True), (48, False)):
        shapes = dict.fromkeys(names, (64, columns))
        assert verdict("mlx", "mlx", Weights(names, shapes=shapes)).loads == loads


def test_rows_of_the_table_name_known_formats_and_say_how_they_are_known() -> None:
    assert {"native", *catalog.export_formats()} <= {*FORMATS}
    assert len({(row.engine, row.format) for row in READS}) == len(READS)
    for row in READS:
        assert row.engine in ENGINES
        assert row.format in FORMATS
        assert any(char.isdigit() for char in row.versions)
        assert "some/folder" in load_commands(row.format, row.engine, "some/folder")
    assert all(formats_of(engine) for engine in ENGINES)


def test_a_pair_that_is_not_read_has_no_command() -> None:
    with pytest.raises(KeyError, match=r"llama\.cpp does not read gptq"):
        load_commands("gptq", "llama.cpp")


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, None), ("0.33", None), ("0.33.4", None), ("0.4", "older"), ("0.34.0", "newer"), ("1", "newer")],
)
def test_another_version_than_the_known_one_is_said(version: str | None, words: str | None) -> None:
    note = version_note("vllm", version)
    assert (note is None) == (words is None)
    assert note is None or (words or "") in note
