"""Tiny random models of the decoder families of transformers 5.24, from the tables of ``tests/architectures``.

A table's entry names a model type, what its values begin with (``bases.yaml``) and values of its own. Models are 64
wide and have two blocks where the family allows that, and the vocabulary of ``tiny.tokenizer``.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from helpers import tiny

TABLES = Path(__file__).parents[1] / "architectures"
KINDS = ("dense", "hybrid", "mixtures", "multimodal")
VISION_FILES = {  # files that a multimodal folder has beside the model
    "preprocessor_config.json": '{"image_processor_type": "CLIPImageProcessor"}\n',
    "processor_config.json": "{}\n",
    "chat_template.jinja": "{{ messages }}\n",
}


class Architecture(NamedTuple):
    """A row of a table: its kind, the model type, values of the configuration, and the class of the model.

    Without a class, ``AutoModelForCausalLM`` chooses it.
    """

    kind: str
    model_type: str
    values: dict[str, Any]
    model_class: str | None

    @property
    def multimodal(self) -> bool:
        """True if the model has a vision tower."""
        return "vision_config" in self.values


def read_table(name: str) -> dict[str, Any]:
    """Return the content of a table."""
    content: dict[str, Any] = yaml.safe_load((TABLES / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    return content


@cache
def architectures() -> dict[str, Architecture]:
    """Return all rows by name, in the order of the tables."""
    tables = {kind: read_table(kind) for kind in KINDS}
    every = read_table("bases") | {name: row for table in tables.values() for name, row in table.items()}
    found = {}
    for kind, table in tables.items():
        for name, row in table.items():
            values = _resolved(row, every)
            found[name] = Architecture(kind, row["type"], values, row.get("class"))
    return found


def _resolved(row: Mapping[str, Any], every: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a row after those of its bases; mappings inside have bases too."""
    names = row.get("base", [])
    values: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        values |= _resolved(every[name], every)
    for key, value in row.items():
        if key not in ("type", "class", "base", "without"):
            values[key] = _resolved(value, every) if isinstance(value, dict) else value
    return {key: value for key, value in values.items() if key not in row.get("without", [])}


def make_config(name: str) -> PreTrainedConfig:
    """Return the configuration of an architecture."""
    row = architectures()[name]
    config: PreTrainedConfig = CONFIG_MAPPING[row.model_type](**row.values)
    return config


def write(name: str, folder: Path) -> Path:
    """Save a random model in bfloat16 and its tokenizer as Hugging Face does."""
    row = architectures()[name]
    torch.manual_seed(0)
    config = make_config(name)
    if row.model_class is None:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    else:
        model = getattr(transformers, row.model_class)(config)
    move(model)
    kept = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for parameter_name, parameter in model.named_parameters():
        if not any(each in parameter_name for each in kept):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    for file, text in (VISION_FILES if row.multimodal else {}).items():
        (folder / file).write_text(text, encoding="utf-8")
    return folder


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Move parameters from the values that would hide a fault: norms of one, biases of zero, tiny matrices."""
    generator = torch.Generator().manual_seed(1)

    def noise(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator)

    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            parameter.copy_(noise(parameter, 0.05))
        elif parameter.dim() == 1:
            parameter.add_(noise(parameter, 0.1))
        elif float(parameter.abs().max()) == 0:
            parameter.add_(noise(parameter, 0.05))
        elif parameter.dim() == 2 and float(parameter.std()) < 0.03 and "embed" not in name:
            parameter.mul_(3)


def load(name: str, folder: Path) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """Load a folder with transformers in float32; return the model, and what does not fit it by kind."""
    row = architectures()[name]
    if row.multimodal:
        auto: Any = transformers.AutoModelForImageTextToText
    else:
        auto = getattr(transformers, row.model_class) if row.model_class else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    faults = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return model.eval(), {key: names for key, names in faults.items() if names}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Return the logits of ``tiny.probe()`` without a cache, in float32."""
    result: Tensor = model(input_ids=tiny.probe(), use_cache=False).logits
    return result.float()
