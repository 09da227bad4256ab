"""llm-compressor's GPTQ as one process, for `peers.py`: `quantize` is its user's whole job, `expand` reads the result.

Run by llm-compressor's own interpreter. Everything not named here is left at that library's default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.torch import save_file


def quantize(model_dir: Path, tokens_file: Path, output_dir: Path, num_bits: int, group_size: int) -> None:
    """Write the compressed-tensors folder ``output_dir``; ``tokens_file`` holds the calibration windows ``[n, t]``."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    windows = np.load(tokens_file)
    columns = {"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()}
    weights = QuantizationArgs(num_bits=num_bits, type="int", symmetric=True, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=str(model_dir),
        dataset=Dataset.from_dict(columns),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        output_dir=str(output_dir),
    )


def expand(folder: Path, dense_file: Path) -> None:
    """Write each packed weight of ``folder`` as float32 ``[out, in]``, unpacked by compressed-tensors itself."""
    import torch
    from transformers import AutoModelForCausalLM

    # float32 asked for at loading: in the folder's bfloat16 the product of code and scale would be rounded again.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # the first forward unpacks every weight
    packed = [name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")]
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight").detach().contiguous() for name in packed}
    save_file(weights, dense_file)


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
