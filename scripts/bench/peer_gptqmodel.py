"""GPTQModel's GPTQ as one process, for `peers.py`: `quantize` is its user's whole job, `expand` reads the result.

Run by GPTQModel's own interpreter. Everything not named here is left at that library's default, except that a machine
with fewer than four cores needs GPTQMODEL_CPU_WORKERS=2 in the environment (`peers.py` sets it).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.torch import save_file


def quantize(model_dir: Path, tokens_file: Path, output_dir: Path, num_bits: int, group_size: int) -> None:
    """Write the GPTQ-format folder ``output_dir``; ``tokens_file`` holds the calibration windows ``[n, t]``."""
    from gptqmodel import GPTQModel, QuantizeConfig

    windows = np.load(tokens_file)
    calibration = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows.tolist()]
    model = GPTQModel.load(str(model_dir), QuantizeConfig(bits=num_bits, group_size=group_size, sym=True))
    model.quantize(calibration)
    model.save(str(output_dir))


def expand(folder: Path, dense_file: Path) -> None:
    """Write each packed weight of ``folder`` as float32 ``[out, in]``, unpacked by GPTQModel itself."""
    # Not at the top: this module turns torch.compile off, and the timed run must keep the library's default.
    from witness_gptq import dense_weights, load_float32

    save_file(dense_weights(load_float32(folder)), dense_file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    quantizing = commands.add_parser("quantize")
    quantizing.add_argument("model", type=Path)
    quantizing.add_argument("tokens", type=Path)
    quantizing.add_argument("output", type=Path)
    quantizing.add_argument("--num-bits", type=int, required=True)
    quantizing.add_argument("--group-size", type=int, required=True)
    expanding = commands.add_parser("expand")
    expanding.add_argument("folder", type=Path)
    expanding.add_argument("dense_file", type=Path)
    args = parser.parse_args()
    if args.command == "quantize":
        quantize(args.model, args.tokens, args.output, args.num_bits, args.group_size)
    else:
        expand(args.folder, args.dense_file)


if __name__ == "__main__":
    main()
