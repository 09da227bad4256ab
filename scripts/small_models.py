"""The architectures that ``train_builtin_model.py`` trains, with random weights that follow from the seed."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel


def build(args: Namespace, tokenizer: Tokenizer, end_of_text: str = "<|endoftext|>") -> PreTrainedModel:
    """Return a Llama, or with ``args.experts`` a Qwen3-MoE, with tied embeddings; the same weights on every device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(args.seed)
    end = tokenizer.token_to_id(end_of_text)
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": args.hidden,
        "intermediate_size": args.mlp,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.hidden // args.heads,
        "max_position_embeddings": args.context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    model: PreTrainedModel
    if args.experts:
        settings |= {"num_experts": args.experts, "num_experts_per_tok": args.chosen, "norm_topk_prob": True}
        settings |= {"moe_intermediate_size": args.mlp, "output_router_logits": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.to(args.device)
    return model
