"""AutoRound as one process, for `peers.py`: `quantize` is its user's whole job, `expand` reads the result.

Run by auto-round's own interpreter. Everything not named here is left at that library's default.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from peer import run
from safetensors.torch import save_file


def quantize(
    model: Path,
    tokens: Path,
    output: Path,
    num_bits: int,
    group_size: int,
    asymmetric: bool,
    preset: str,
    device: str,
) -> None:
    """Write the folder ``output``; ``tokens`` holds the calibration windows ``[n, t]``."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = torch.from_numpy(np.load(tokens))
    presets: dict[str, dict[str, Any]] = {"light": {"iters": 50, "lr": 5e-3}, "default": {}, "best": {"iters": 1000}}
    AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False),
        AutoTokenizer.from_pretrained(model, trust_remote_code=False),
        bits=num_bits,
        group_size=group_size,
        sym=not asymmetric,
        dataset=list(windows.split(1)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map=device,
        **presets[preset],
    ).quantize_and_save(str(output), format="auto_round")


def expand(folder: Path, dense_file: Path) -> None:
    """Write each packed weight of ``folder`` as float32 ``[out, in]``: the output of its layer for a unit matrix."""
    import torch
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    folder = next(folder.rglob("config.json")).parent  # auto-round writes into a subfolder
    config = AutoRoundConfig(backend="torch")
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", trust_remote_code=False
    )
    weights = {}
    with torch.inference_mode():
        for name, layer in model.named_modules():
            if hasattr(layer, "qweight"):
                layer.float()  # casts scales too: a product of code and scale must not be rounded to float16
                bias = 0 if layer.bias is None else layer.bias
                weights[f"{name}.weight"] = (layer(torch.eye(layer.infeatures)) - bias).T.contiguous()
    save_file(weights, dense_file)


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--preset", default="default", choices=["light", "default", "best"])
    parser.add_argument("--device", default="cpu")


if __name__ == "__main__":
    run(__doc__, quantize, expand, more_options)
