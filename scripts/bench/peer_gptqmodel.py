"""GPTQModel's GPTQ as one process, for `peers.py`: `quantize` is its user's whole job, `expand` reads the result.

Run by GPTQModel's own interpreter. Everything not named here is left at that library's default, except that a machine
with fewer than four cores needs GPTQMODEL_CPU_WORKERS=2 in the environment (`peers.py` sets it).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from peer import run
from safetensors.torch import save_file

RUNNER = Path(__file__).parents[2] / "qtool" / "exporters" / "_runners" / "gptqmodel.py"  # it unpacks weights


def quantize(model: Path, tokens: Path, output: Path, num_bits: int, group_size: int) -> None:
    """Write the GPTQ-format folder ``output``; ``tokens`` holds the calibration windows ``[n, t]``."""
    from gptqmodel import GPTQModel, QuantizeConfig

    windows = np.load(tokens)
    calibration = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows.tolist()]
    quantizer = GPTQModel.load(str(model), QuantizeConfig(bits=num_bits, group_size=group_size, sym=True))
    quantizer.quantize(calibration)
    quantizer.save(str(output))


def expand(folder: Path, dense_file: Path) -> None:
    """Write each packed weight of ``folder`` as float32 ``[out, in]``, unpacked by GPTQModel itself."""
    # Not at the top: this file turns torch.compile off, and the timed run must keep the library's default.
    spec = importlib.util.spec_from_file_location("runner", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    save_file({f"{name}.weight": torch.from_numpy(rows) for name, rows in runner.weights(folder)}, dense_file)


if __name__ == "__main__":
    run(__doc__, quantize, expand)
