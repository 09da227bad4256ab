"""What the table of engines says is loaded, an exporter writes: the two agree on every grid of a tiny model."""

from functools import cache
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from qtool.config import catalog
from qtool.config.engines import READS
from qtool.config.grids import BLOCK_GRIDS
from qtool.config.loadable import verdict
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.models.described import described_model
from qtool.models.loaded import LoadedModel
from qtool.pipelines.target import checked, selection
from qtool.system.errors import InputError

tables = st.one_of(
    st.just("float"),
    st.fixed_dictionaries({"num_bits": st.sampled_from([4, 8]), "group_size": st.sampled_from([-1, 32])}),
)
affine = st.fixed_dictionaries(
    {
        "num_bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([-1, 16, 32, 64]),
        "symmetric": st.booleans(),
        "scale_dtype": st.sampled_from(["float16", "bfloat16", "float32"]),
        "embedding": tables,
        "head": st.one_of(st.just("same"), tables),
        "activations": st.sampled_from([None, 8, {"num_bits": 8, "symmetric": True}]),
        "overrides": st.sampled_from([{}, {"*.o_proj": {"num_bits": 8}}, {"*.0.*": {"skip": True}}]),
    }
)
blocks = st.fixed_dictionaries({"grid": st.sampled_from(sorted(BLOCK_GRIDS))})


@cache
def model(folder: Path) -> LoadedModel:
    """The tiny Llama by its config alone."""
    return described_model(ModelConfig(path=str(folder)))


@given(st.one_of(affine, blocks))
@example(values={"group_size": 32, "overrides": {"*.0.*": {"skip": True}}})  # which a config of GPTQ cannot express
def test_what_the_table_says_is_loaded_its_exporter_does_not_refuse(
    llama_folder: Path, values: dict[str, object]
) -> None:
    try:
        found = selection(model(llama_folder), QuantConfig.model_validate(values))
    except InputError:  # no checkpoint has these grids
        return
    for row in READS:
        if row.format in catalog.export_formats() and verdict(row.engine, row.format, found.weights).loads:
            assert checked(row.engine, row.format, found).reasons == (), row.format
