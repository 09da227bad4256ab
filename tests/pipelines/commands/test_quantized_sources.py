"""A model that is published in FP8 goes through a run as its float model does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.quantized_sources import COMPRESSED, DEEPSEEK, in_blocks, in_rows, write
from helpers.whole_runs import Result

from qtool.models.folders import read_config
from qtool.models.quantized_sources import expanded, expanded_in

Commands = tuple[Callable[..., Result], Callable[..., str]]


@pytest.mark.parametrize("method", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
def test_a_run_from_fp8_writes_what_a_run_from_the_float_model_writes(
    models: Path, qtool_: Callable[..., Result], recipe: Callable[..., str], method: str
) -> None:
    fp8 = write(models / "llama", Path("fp8"), DEEPSEEK, lambda w: in_blocks(w, (40, 48)), "weight_scale_inv", shards=2)
    with expanded_in(Path("made")):
        expanded("m", fp8, read_config(fp8)).rename("float")
    sections: dict[str, Any] = {
        "method": {"name": method},
        "data": {"source": str(models / "prose.txt"), "num_samples": 4, "seq_len": 32},
    }
    if method == "gptq":
        sections["eval"] = {"tasks": ["kl"], "limit": 2, "context": 32}
    for name in ("fp8", "float"):
        path = recipe(model={"path": name}, output={"path": f"out/{name}"}, **sections)
        result = qtool_("ptq", path)
        assert result.code == 0, result.err
        assert ("14 of 21 tensors are stored in FP8" in result.err) == (name == "fp8")
    one, other = tiny.stored(Path("out/fp8")), tiny.stored(Path("out/float"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype for name, tensor in one.items())
    assert read_config(Path("out/fp8")) == read_config(Path("out/float"))
    assert sorted(path.name for path in Path("out").iterdir()) == ["float", "fp8"]
    assert qtool_("verify", "out/fp8").code == 0
    if method == "gptq":
        assert qtool_("export", "out/fp8", "-f", "dense", "-o", "out/dense").code == 0
        assert qtool_("reproduce", "out/fp8").code == 0


def test_eval_measures_an_fp8_model(models: Path, qtool_: Callable[..., Result]) -> None:
    folder = write(models / "llama", Path("ct"), COMPRESSED, in_rows, "weight_scale")
    result = qtool_("eval", folder, "--tasks", "generated", "--limit", "2", "--context", "32")
    assert result.code == 0, result.err
    assert "14 of 21 tensors are stored in FP8 (compressed-tensors)" in result.err
