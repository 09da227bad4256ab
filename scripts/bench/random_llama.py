"""A random bfloat16 Llama or Qwen3-MoE, and native checkpoints of it, for ``qtool bench`` and for measuring memory.

    python scripts/bench/random_llama.py out/llama --grids w4g128,w8pc,w8g128,w3g128,w2g64a
    qtool bench out/llama/w4g128

    python scripts/bench/random_llama.py out/deep16 --blocks 16 --mlp 5632 --kv-heads 4 --vocabulary 32000 --grids ""
    python scripts/bench/peers.py --model out/deep16/float --bits 4 --group-size 128 --num-samples 16 --eval-windows 1

    python scripts/bench/random_llama.py out/moe16 --blocks 16 --hidden 768 --mlp 512 --kv-heads 4 --experts 64 --grids=

By default about 0.5 B parameters in blocks of the shape of Llama 3.2 1B: hidden 2048, MLP 8192, 32 heads, 8 of keys and
values. Weights are random and rounded to nearest: neither speed nor memory depends on their values.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qtool.blocks.job import Job
from qtool.checkpoints import native, output_folder
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.methods import rtn
from qtool.models.folders import BUILTIN
from qtool.models.loading import load_model
from qtool.models.targets import select_targets


def quant(grid: str) -> QuantConfig:
    """Return the grid of a short name such as ``w4g64``, ``w8pc`` (one group per row) or ``w2g64a`` (asymmetric)."""
    name = grid.removesuffix("a")
    bits, group = int(name[1]), -1 if name.endswith("pc") else int(name[3:])
    return QuantConfig.model_validate({"num_bits": bits, "group_size": group, "symmetric": name == grid})


def make_float(
    folder: Path, vocabulary: int, blocks: int, mlp: int, kv_heads: int, hidden: int = 2048, experts: int = 0
) -> None:
    """Write the float model."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": torch.bfloat16,
    }
    torch.set_default_dtype(torch.bfloat16)
    if experts:
        settings |= {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": mlp, "head_dim": 64}
        model: PreTrainedModel = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    torch.set_default_dtype(torch.float32)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUILTIN / "wiki-llama-3m", trust_remote_code=False).save_pretrained(folder)


def main() -> None:
    """Write the folders that do not exist yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--mlp", type=int, default=8192)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=0, help="experts of each block, of the width --mlp; 0: a Llama")
    parser.add_argument("--grids", default="w4g128")
    args = parser.parse_args()
    if not (args.folder / "float").exists():
        settings = (args.vocabulary, args.blocks, args.mlp, args.kv_heads, args.hidden, args.experts)
        make_float(args.folder / "float", *settings)
    for grid in filter(None, args.grids.split(",")):
        if (args.folder / grid).exists():
            continue
        loaded = load_model(ModelConfig(path=str(args.folder / "float"), dtype="bfloat16", device="cpu"))
        specs = {target.name: target.spec for target in select_targets(loaded, quant(grid))}
        rtn.run(Job.select(loaded, quant(grid)), rtn.Config())
        with output_folder.atomic_folder(args.folder / grid, overwrite=False) as partial:
            native.save(partial, loaded, specs)
        print(args.folder / grid)


if __name__ == "__main__":
    main()
