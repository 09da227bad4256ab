"""llm-compressor's GPTQ as one process, for `peers.py`: `quantize` is its user's whole job, `expand` reads the result.

Run by llm-compressor's own interpreter. Everything not named here is left at that library's default.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from peer import run
from safetensors.torch import save_file


def quantize(model: Path, tokens: Path, output: Path, num_bits: int, group_size: int) -> None:
    """Write the compressed-tensors folder ``output``; ``tokens`` holds the calibration windows ``[n, t]``."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    windows = np.load(tokens)
    columns = {"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()}
    weights = QuantizationArgs(num_bits=num_bits, type="int", symmetric=True, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=str(model),
        dataset=Dataset.from_dict(columns),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        output_dir=str(output),
    )


def expand(folder: Path, dense_file: Path) -> None:
    """Write each packed weight of ``folder`` as float32 ``[out, in]``, unpacked by compressed-tensors itself."""
    import torch
    from transformers import AutoModelForCausalLM

    # float32 asked for at loading: in the folder's bfloat16 the product of code and scale would be rounded again.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # the first forward unpacks every weight
    packed = [name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")]
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight").detach().contiguous() for name in packed}
    save_file(weights, dense_file)


if __name__ == "__main__":
    run(__doc__, quantize, expand)
