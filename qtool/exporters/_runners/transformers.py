"""transformers, which reads folders of compressed-tensors, GPTQ, AWQ and auto-round through their packages.

Kernels of GPTQModel and auto-round multiply in half precision on a CPU, so such a model is loaded in float16 and cast
to float32 afterwards. Codes are integers and the scales are stored in float16, so nothing is lost.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute and may fuse roundings

import torch
import transformers

from .in_torch import in_float32, logits

__all__ = ["load", "logits", "text_tokens"]

THROUGH_HALF = ("gptq", "awq", "auto-round")  # methods whose kernels compute in half precision


def load(folder: Path) -> Any:
    """Return the model, which computes in float32."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    section = getattr(config, "quantization_config", None) or {}
    method = section.get("quant_method")
    options: dict[str, Any] = {"dtype": torch.float16 if method in THROUGH_HALF else torch.float32}
    if method == "compressed-tensors" and not all(
        group["weights"].get("symmetric", True) for group in section["config_groups"].values()
    ):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    if not section and not any(folder.glob("*.safetensors")):
        options["gguf_file"] = "model.gguf"
    if method == "awq":
        made: Any = transformers.AwqConfig  # its backend is typed as an enumeration, and any of its values is taken
        options["quantization_config"] = made(backend="torch_awq")
    several = getattr(transformers.models.auto.modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING", ())  # not in version 4
    kind = transformers.AutoModelForMultimodalLM if type(config) in several else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, device_map="cpu", trust_remote_code=False, **options).eval()
    return in_float32(model, folder) if method in THROUGH_HALF else model


def text_tokens(model: Any, text: str) -> list[int]:
    """Return the tokens that the tokenizer in the folder makes of a text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
    found: list[int] = tokenizer(text)["input_ids"]
    return found
