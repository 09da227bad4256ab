"""Logits of a GPTQ-format folder as GPTQModel computes them, to compare qtool's own with.

Run by an interpreter that has GPTQModel (7.x), with no GPU needed:

    <python of that environment> witness_gptq.py FOLDER WITNESS.safetensors --weights

GPTQModel's plain torch kernel unpacks the codes, zero points and scales; versions 1 and 2 of the format, 2, 3, 4 and
8 bits, symmetric and not. That kernel loads in float16 only, so the model is cast to float32 after loading: codes are
integers and the scales are stored as float16, so nothing was lost, and every product is then exact to float32. The
written file holds `tokens` int64 [b, t], `logits` float32 [b, t, vocabulary], and with `--weights` the float32 weight
`<linear>.weight` [out, in] of every quantized linear, for which equality to the last bit can be asked.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute and may fuse roundings

import torch
from gptqmodel import BACKEND, GPTQModel, __version__
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_float32(folder: Path, *, by_transformers: bool = False) -> PreTrainedModel:
    """Load a GPTQ-format folder, with packed linears that compute in float32 on the CPU."""
    if by_transformers:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float16, device_map="cpu", trust_remote_code=False
        )
        nn.Module.float(model.eval())  # model.float() refuses quantized models
    else:
        loaded = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
        model = loaded.model.eval().float()
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored.update(load_file(file))
    for name, parameter in model.named_parameters():
        if name in stored:  # embeddings and norms: float16 has rounded their smallest values
            parameter.data = stored[name].float()
    return model


def dense_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return ``<linear>.weight`` float32 ``[out, in]`` of every packed linear, unpacked by GPTQModel."""
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)]
    return {f"{name}.weight": module.dequantize_weight().T.contiguous() for name, module in packed}


def fixed_tokens(vocab_size: int, num_windows: int, seq_len: int) -> Tensor:
    """Return windows ``[num_windows, seq_len]`` of uniformly drawn tokens, the same on every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (num_windows, seq_len), generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a GPTQ-format model folder")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--tokens", type=Path, help="a .npy of windows [b, t]; default: two of 64 drawn with seed 0")
    parser.add_argument("--weights", action="store_true", help="also write the dequantized weights")
    parser.add_argument("--transformers", action="store_true", help="load with transformers, which reads by optimum")
    args = parser.parse_args()

    model = load_float32(args.folder, by_transformers=args.transformers)
    if args.tokens is None:
        tokens = fixed_tokens(model.config.vocab_size, num_windows=2, seq_len=64)
    else:
        import numpy as np

        tokens = torch.from_numpy(np.load(args.tokens)).long()
    with torch.inference_mode():
        witness = {"tokens": tokens, "logits": model(input_ids=tokens).logits.contiguous()}
        if args.weights:
            witness |= dense_weights(model)
    save_file(witness, args.output, metadata={"gptqmodel": __version__, "torch": torch.__version__})
    print(args.output)


if __name__ == "__main__":
    main()
