"""Weights and logits of an auto-round folder as transformers with auto-round computes them.

Run by an interpreter that has auto-round and transformers, with no GPU needed:

    <python of that environment> witness_auto_round.py FOLDER WITNESS.safetensors

auto-round multiplies in half precision on a CPU, so the model is cast to float32 after loading: codes are
integers and the scales are stored as float16, so nothing was lost. The written file holds `tokens` int64 [b, t],
`logits` float32 [b, t, vocabulary], and the float32 weight `<linear>.weight` [out, in] of every packed linear.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from auto_round.version import __version__
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_float32(folder: Path) -> PreTrainedModel:
    """Load an auto-round folder, with packed linears that compute in float32 on the CPU."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, trust_remote_code=False
    ).eval()
    nn.Module.float(model)  # model.float() refuses quantized models
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored.update(load_file(file))
    for name, parameter in model.named_parameters():
        if name in stored:  # embeddings and norms: float16 has rounded their smallest values
            parameter.data = stored[name].float()
    return model


@torch.inference_mode()
def dense_weight(layer: Any) -> Tensor:  # Any: auto-round's classes are untyped
    """Return the weight float32 ``[out, in]`` of a packed linear: its outputs for the unit vectors."""
    bias = layer.bias
    layer.bias = None
    weight: Tensor = layer(torch.eye(layer.infeatures)).T.contiguous()
    layer.bias = bias
    return weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an auto-round folder")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    args = parser.parse_args()
    model = load_float32(args.folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, 64), generator=generator)
    with torch.inference_mode():
        witness = {"tokens": tokens, "logits": model(input_ids=tokens).logits.contiguous()}
    packed = {name: layer for name, layer in model.named_modules() if hasattr(layer, "qweight")}
    witness |= {f"{name}.weight": dense_weight(layer) for name, layer in packed.items()}
    save_file(witness, args.output, metadata={"auto-round": __version__, "torch": torch.__version__})
    print(args.output)


if __name__ == "__main__":
    main()
