"""transformers, which reads folders of compressed-tensors, GPTQ, AWQ and auto-round through their packages.

Kernels of GPTQModel and auto-round multiply in half precision on a CPU, so such a model is loaded in float16 and cast
to float32 afterwards. Codes are integers and the scales are stored in float16, so nothing is lost.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute and may fuse roundings

import numpy.typing as npt
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

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
        options["quantization_config"] = transformers.AwqConfig(backend="torch_awq")
    several = getattr(transformers.models.auto.modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING", ())  # not in version 4
    kind = transformers.AutoModelForMultimodalLM if type(config) in several else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, device_map="cpu", trust_remote_code=False, **options).eval()
    return in_float32(model, folder) if method in THROUGH_HALF else model


def in_float32(model: Any, folder: Path) -> Any:
    """Cast ``model``, which was loaded in float16 from ``folder``, to float32, with the stored float tensors."""
    nn.Module.float(model)  # model.float() refuses quantized models
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored.update(load_file(file))
    for name, parameter in model.named_parameters():
        if name in stored:  # embeddings and norms: float16 has rounded their smallest values
            parameter.data = stored[name].float()
    return model


def text_tokens(model: Any, text: str) -> list[int]:
    """Return the tokens that the tokenizer in the folder makes of a text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
    found: list[int] = tokenizer(text)["input_ids"]
    return found


def logits(model: Any, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the logits ``[t, vocabulary]`` of ``tokens`` ``[t]``."""
    with torch.inference_mode():
        found: npt.NDArray[Any] = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].float().numpy()
    return found
