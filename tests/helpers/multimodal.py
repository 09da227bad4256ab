"""Tiny random multimodal models: a vision tower beside a text decoder, and prompts with a picture for each."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipImageProcessor,
)

from helpers import tiny
from helpers.families import GATED, LOCAL_AND_GLOBAL

# special tokens of pictures; their ids follow those of the plain tokenizer
SPECIAL = (
    *("<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<start_of_image>"),
    *("<end_of_image>", "<image_soft_token>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
)
# a chat template as multimodal models have it: a picture is a placeholder, which the processor makes longer
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{{ eos_token }}{% endfor %}"
)
ID = {token: tiny.VOCABULARY + index for index, token in enumerate(SPECIAL)}
TOKENS = tiny.VOCABULARY + 32  # rows of the embedding table
TEXT = GATED | {"vocab_size": TOKENS}
HEADS = TEXT | {"head_dim": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64} | {
    "patch_size": 14
}
QWEN = {"image_token_id": ID["<|image_pad|>"], "video_token_id": ID["<|video_pad|>"]} | {
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
GEMMA = {
    "mm_tokens_per_image": 4,
    "boi_token_index": ID["<start_of_image>"],
    "eoi_token_index": ID["<end_of_image>"],
    "image_token_index": ID["<image_soft_token>"],
}
LARGE_TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
PIXTRAL = {"model_type": "pixtral", "head_dim": 16, "image_size": 56}
IDEFICS = {
    "text_config": TEXT | {"model_type": "llama"},
    "vision_config": TOWER | {"image_size": 56},
    "image_token_id": ID["<image>"],
    "scale_factor": 2,
}


class Family(NamedTuple):
    """The config of a model, and what stands for a picture in its prompts."""

    config: str
    values: dict[str, Any]  # Any: a configuration's values are of many types
    placeholder: tuple[str, ...]
    pixels: tuple[int, ...] = (1, 3, 28, 28)


IMAGE = ("<image>",) * 4
PAD = ("<|vision_start|>", *("<|image_pad|>",) * 4, "<|vision_end|>")
SOFT = ("<start_of_image>", *("<image_soft_token>",) * 4, "<end_of_image>")
PATCHES = (16, 3 * 2 * 14 * 14)
GEMMA3 = {"text_config": HEADS | LOCAL_AND_GLOBAL, "vision_config": TOWER} | GEMMA
FAMILIES = {
    "qwen2_vl": Family(
        "Qwen2VLConfig",
        {
            "text_config": TEXT | {"rope_parameters": ROPE},
            "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
            | {"patch_size": 14},
        }
        | QWEN,
        PAD,
        PATCHES,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLConfig",
        {
            "text_config": TEXT | {"rope_parameters": ROPE},
            "vision_config": QWEN_TOWER | {"fullatt_block_indexes": [1]},
        }
        | QWEN,
        PAD,
        PATCHES,
    ),
    "qwen3_vl": Family(
        "Qwen3VLConfig",
        {
            "text_config": HEADS | {"rope_parameters": ROPE | {"mrope_interleaved": True}},
            "vision_config": QWEN_TOWER | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        }
        | QWEN,
        PAD,
        PATCHES,
    ),
    "qwen3_5": Family(
        "Qwen3_5Config",
        {"text_config": HEADS | DELTA, "vision_config": QWEN_TOWER | {"num_position_embeddings": 16}} | QWEN,
        PAD,
        PATCHES,
    ),
    "gemma3": Family("Gemma3Config", GEMMA3, SOFT),
    "gemma3_deep": Family("Gemma3Config", GEMMA3 | {"vision_config": TOWER | {"num_hidden_layers": 3}}, SOFT),
    "gemma3_large": Family("Gemma3Config", GEMMA3 | {"vision_config": TOWER | LARGE_TOWER}, SOFT),
    "llava": Family(
        "LlavaConfig",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": TOWER | {"model_type": "clip_vision_model"},
            "image_token_index": ID["<image>"],
        },
        IMAGE,
    ),
    "mistral3": Family(
        "Mistral3Config",
        {
            "text_config": HEADS | {"model_type": "mistral"},
            "vision_config": TOWER | PIXTRAL,
            "image_token_index": ID["<image>"],
        },
        IMAGE,
        (1, 3, 56, 56),
    ),
    "idefics3": Family(
        "Idefics3Config",
        IDEFICS,
        IMAGE,
        (1, 1, 3, 56, 56),
    ),
    "smolvlm": Family(
        "SmolVLMConfig",
        IDEFICS,
        IMAGE,
        (1, 1, 3, 56, 56),
    ),
    "paligemma": Family(
        "PaliGemmaConfig",
        {
            "text_config": HEADS | {"model_type": "gemma"},
            "vision_config": TOWER | {"model_type": "siglip_vision_model"},
            "image_token_index": ID["<image>"],
            "projection_dim": 64,
        },
        IMAGE,
    ),
    # blocks that attend to pictures lie between those that do not
    "mllama": Family(
        "MllamaConfig",
        {
            "text_config": TEXT
            | {
                "num_hidden_layers": 4,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            | {"num_global_layers": 1, "attention_heads": 2, "image_size": 28, "patch_size": 14}
            | {"vision_output_dim": 64, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
            | {"max_num_tiles": 1},
            "image_token_index": ID["<image>"],
        },
        ("<image>",),
        (1, 1, 1, 3, 28, 28),
    ),
}


PROCESSORS = ("llava", "idefics3", "paligemma")  # families whose processors need no torchvision


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the tiny models, with special tokens of pictures."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    assert made.convert_tokens_to_ids(SPECIAL[-1]) == ID[SPECIAL[-1]]
    return made


def make(name: str) -> PreTrainedModel:
    """Return a random model whose norms and biases differ from their defaults."""
    family = FAMILIES[name]
    config: PreTrainedConfig = getattr(transformers, family.config)(**family.values)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def write(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a random model with a tokenizer."""
    tiny.moved(make(name), dtype).save_pretrained(folder)
    (processor(name) if name in PROCESSORS else tokenizer()).save_pretrained(folder)
    return folder


def prompt(name: str, seed: int = 0, length: int = 24) -> dict[str, Tensor]:
    """Return what the model gets of a picture with text around it, ``[1, length]`` tokens."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    picture = [ID[token] for token in family.placeholder]
    text = torch.randint(1, tiny.VOCABULARY, (length - len(picture),), generator=generator).tolist()
    at = 1 + seed % 5
    tokens = torch.tensor([[*text[:at], *picture, *text[at:]]])
    found = {"input_ids": tokens, "pixel_values": torch.randn(family.pixels, generator=generator)}
    inside = torch.isin(tokens, torch.tensor([ID[t] for t in ("<image>", "<|image_pad|>", "<image_soft_token>")]))
    if family.pixels is PATCHES:
        found |= {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": inside.int()}
    if name == "mistral3":
        found["image_sizes"] = torch.tensor([[56, 56]])
    if name == "mllama":
        shown = (torch.arange(length) >= at).long().view(1, length, 1, 1)  # tokens after the picture attend to it
        found |= {"cross_attention_mask": shown, "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64)}
        found["aspect_ratio_mask"] = torch.ones(1, 1, 1, dtype=torch.int64)
    if name.startswith("gemma3") or name == "paligemma":
        found["token_type_ids"] = inside.int() if name != "paligemma" else torch.zeros_like(tokens)
    return found


def processor(name: str) -> ProcessorMixin:
    """Return a processor for pictures of 28 or 56 pixels."""
    options: dict[str, Any] = {"tokenizer": tokenizer(), "chat_template": TEMPLATE}
    if name == "llava":
        clip = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        features = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(clip, **options, **features)
    if name == "idefics3":
        largest = {"longest_edge": 56}
        idefics = Idefics3ImageProcessor(size=largest, max_image_size=largest)
        return Idefics3Processor(idefics, image_seq_len=4, **options)
    siglip: Any = SiglipImageProcessor(size={"height": 28, "width": 28})
    siglip.image_seq_length = 4
    return PaliGemmaProcessor(siglip, tokenizer())  # no chat template, as published
