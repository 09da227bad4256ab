"""AutoRound as one process, for `peers.py`: `quantize` is its user's whole job, `expand` reads the result.

Run by auto-round's own interpreter. Everything not named here is left at that library's default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.torch import save_file


def quantize(args: argparse.Namespace) -> None:
    """Write the folder ``args.output``; ``args.tokens`` holds the calibration windows ``[n, t]``."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = torch.from_numpy(np.load(args.tokens))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    presets = {"light": {"iters": 50, "lr": 5e-3}, "default": {}, "best": {"iters": 1000}}
    AutoRound(
        model,
        AutoTokenizer.from_pretrained(args.model),
        bits=args.num_bits,
        group_size=args.group_size,
        sym=not args.asymmetric,
        dataset=list(windows.split(1)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
        **presets[args.preset],
    ).quantize_and_save(str(args.output), format="auto_round")


def expand(args: argparse.Namespace) -> None:
    """Write each packed weight of ``args.folder`` as float32 ``[out, in]``: what its layer makes of a unit matrix."""
    import torch
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    folder = next(args.folder.rglob("config.json")).parent  # auto-round makes a folder inside the one it is given
    config = AutoRoundConfig(backend="torch")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    weights = {}
    with torch.inference_mode():
        for name, layer in model.named_modules():
            if hasattr(layer, "qweight"):
                layer.float()  # scales too, so that the product of code and scale is not rounded to half precision
                bias = 0 if layer.bias is None else layer.bias
                weights[f"{name}.weight"] = (layer(torch.eye(layer.infeatures)) - bias).T.contiguous()
    save_file(weights, args.dense_file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    quantizing = commands.add_parser("quantize")
    quantizing.add_argument("model", type=Path)
    quantizing.add_argument("tokens", type=Path)
    quantizing.add_argument("output", type=Path)
    quantizing.add_argument("--num-bits", type=int, required=True)
    quantizing.add_argument("--group-size", type=int, required=True)
    quantizing.add_argument("--asymmetric", action="store_true")
    quantizing.add_argument("--preset", default="default", choices=["light", "default", "best"])
    quantizing.set_defaults(function=quantize)
    expanding = commands.add_parser("expand")
    expanding.add_argument("folder", type=Path)
    expanding.add_argument("dense_file", type=Path)
    expanding.set_defaults(function=expand)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
