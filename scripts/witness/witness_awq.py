"""Logits and weights of an AWQ folder as transformers computes them with GPTQModel, to compare qtool's own with.

Run by an interpreter that has GPTQModel (7.x) and transformers 5, with no GPU needed:

    <python of that environment> witness_awq.py FOLDER WITNESS.safetensors

transformers replaces the linears by GPTQModel's, whose plain torch kernel unpacks AWQ's gemm layout. The model is cast
to float32 after loading: codes are integers and scales are stored as float16, so nothing was lost. The written file
holds `tokens` int64 [b, t], `logits` float32 [b, t, vocabulary], and the float32 weight `<linear>.weight` [out, in] of
every quantized linear, dequantized by GPTQModel, for which equality to the last bit can be asked.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute and may fuse roundings

import torch
from gptqmodel import __version__
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AwqConfig


def load_float32(folder: Path) -> nn.Module:
    """Load an AWQ folder with packed linears that compute in float32 on the CPU."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float16,
        device_map="cpu",
        trust_remote_code=False,
        quantization_config=AwqConfig(backend="torch_awq"),
    )
    nn.Module.float(model.eval())  # model.float() refuses quantized models
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored.update(load_file(file))
    for name, parameter in model.named_parameters():
        if name in stored:  # embeddings and norms: float16 has rounded their smallest values
            parameter.data = stored[name].float()
    return model


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return ``<linear>.weight`` float32 ``[out, in]`` of every packed linear, unpacked by GPTQModel."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            parts = layer.qweight, layer.qzeros, layer.scales.float()
            found[f"{name}.weight"] = dequantize_gemm(*parts, layer.bits, layer.group_size).T.contiguous()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an AWQ model folder")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    args = parser.parse_args()

    model = load_float32(args.folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, 64), generator=generator)
    with torch.inference_mode():
        witness = {"tokens": tokens, "logits": model(input_ids=tokens).logits.contiguous()} | dense_weights(model)
    save_file(witness, args.output, metadata={"gptqmodel": __version__, "torch": torch.__version__})
    print(args.output)


if __name__ == "__main__":
    main()
