"""The class of transformers that loads a model whole: with its vision and sound towers, if it has such.

``AutoModelForCausalLM`` knows no class of many multimodal models, and of others the language model alone, so that a
folder written from it would lack the towers.
"""

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING

from qtool.system.errors import InputError


def auto_class(config: PreTrainedConfig) -> Any:  # Any: auto classes have no common type
    """Return ``AutoModelForMultimodalLM`` if ``config`` is of a multimodal model, and else ``AutoModelForCausalLM``.

    Raises:
        InputError: transformers has no language model for ``config``, or one with an encoder.
    """
    if config.is_encoder_decoder:
        raise InputError(f"the model type {config.model_type!r} has an encoder; only decoders are supported")
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise InputError(
            f"the model type {config.model_type!r} is an encoder, which reads the words after a position as well as "
            "those before it; only decoders, which predict the next token, are supported"
        )
    if not is_known(config):
        raise InputError(
            f"transformers has no language model for the model type {config.model_type!r} by itself; use a folder of "
            "the whole model"
        )
    return AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM


def is_known(config: PreTrainedConfig) -> bool:
    """Return whether transformers itself has a language model, multimodal or not, for ``config``."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or is_multimodal(config)


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Return whether ``config`` is of a model that reads pictures or sound beside text."""
    return type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
