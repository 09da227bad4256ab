"""Each weight is read at most twice before the first block: for the hash of its file, and to check its values."""

import hashlib
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.stopped_runs import make
from safetensors import safe_open
from torch import Tensor

from qtool.methods import gptq
from qtool.pipelines import quantize

BUDGETS = {
    "plain": None,
    "budget of bits": {"average_bits": 3.5, "estimator": "block"},
    "budget by the whole model": {"average_bits": 3.5, "estimator": "loss"},
    "budget of bytes": {"size": 120_000, "estimator": "hessian"},
}


class FirstBlock(Exception):
    """Ends a run where its first block would be quantized."""


class Scans:
    """Counts how often all values of each linear's weight are read, by the name of the parameter."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.weights = {name: value for name, value in tiny.stored(folder).items() if name.endswith("_proj.weight")}
        self.extremes: Counter[str] = Counter()
        self.hashes: Counter[str] = Counter()
        aminmax, digest = Tensor.aminmax, hashlib.file_digest

        def watched_aminmax(values: Tensor, **options: Any) -> Any:
            self.extremes.update(self.names_of(values))
            return aminmax(values, **options)

        def watched_digest(file: BufferedReader, algorithm: str) -> Any:
            path = Path(file.name)
            if path.parent == folder and path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as reader:
                    self.hashes.update(self.weights.keys() & set(reader.keys()))
            return digest(file, algorithm)

        patch.setattr(Tensor, "aminmax", watched_aminmax)
        patch.setattr(hashlib, "file_digest", watched_digest)

    def names_of(self, values: Tensor) -> list[str]:
        """Return the weights that have these values, in whatever shape and dtype they are read."""
        flat = values.detach().float().flatten()
        return [name for name, weight in self.weights.items() if torch.equal(weight.float().flatten(), flat)]


@pytest.mark.parametrize("source", ["text", "generated"])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=list(BUDGETS))
def test_every_weight_is_read_at_most_twice_before_the_first_block(
    budget: dict[str, object] | None, source: str, tmp_path: Path
) -> None:
    """The file's SHA-256 is one scan, the extremes (``aminmax``) of a weight are another; both are counted.

    Under a budget the estimators of sensitivity read the weights as well, to round them; that is their work and no
    check, so products, roundings and norms are not counted. An estimator that needs the whole model in memory, and text
    that the model writes itself, load it a second time; that load is not checked again.
    """
    tiny.llama(tmp_path / "float")
    tiny.text(tmp_path).rename(tmp_path / "text.txt")
    checked = make(tmp_path, tmp_path / "out", "gptq", quant__budget=budget)
    if source == "generated":
        checked = checked.model_copy(update={"data": checked.data.model_copy(update={"source": source})})

    def stop(*args: object, **options: object) -> None:
        raise FirstBlock

    with pytest.MonkeyPatch.context() as patch:
        scans = Scans(tmp_path / "float", patch)
        patch.setattr(gptq, "run_blocks", stop)
        with pytest.raises(FirstBlock):
            quantize.quantize(checked)
    assert len(scans.weights) == 14
    for name in scans.weights:
        assert scans.extremes[name] == 1, name
        assert scans.extremes[name] + scans.hashes[name] <= 2, name
    assert set(scans.hashes) == set(scans.weights), "the hash of the model's file was not counted"
