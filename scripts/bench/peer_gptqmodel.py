"""GPTQModel's GPTQ as one process, for `peers.py`: `quantize` is its user's whole job, `expand` reads the result.

Run by GPTQModel's own interpreter. Everything not named here is left at that library's default, except that a machine
with fewer than four cores needs GPTQMODEL_CPU_WORKERS=2 in the environment (`peers.py` sets it).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from peer import run
from safetensors.torch import save_file


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
    # Not at the top: this module turns torch.compile off, and the timed run must keep the library's default.
    from witness_gptq import dense_weights, load_float32

    save_file(dense_weights(load_float32(folder)), dense_file)


if __name__ == "__main__":
    run(__doc__, quantize, expand)
