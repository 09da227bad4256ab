"""Every export in its engine: weights bit by bit, logits and perplexity beside torch's, as one table.

    QTOOL_MLX_PYTHON=... QTOOL_LLAMA_CPP_PYTHON=... python scripts/bench/engine_runs.py [--models builtin FOLDER ...]

Models are those of ``real_models.py``, folders, and random ones: ``qwen2``, ``gemma3``, ``qwen3_moe``. Each is rounded
to nearest at 4 and at 2 bits in groups of 64 (a method with data would change perplexities, not what is compared),
exported to every format that an engine here reads, and given to ``qtool verify --against --engine``. Engines live in
environments of their own, named by variables; the row of a missing one says so. The text is WikiText-2's first windows.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from real_models import BUILTIN, NAMES, model_folder

import qtool
from qtool.config.recipe import check_export
from qtool.pipelines.export import export
from qtool.pipelines.verify import verify_export
from qtool.pipelines.verify_engine import Text
from qtool.system.errors import InputError, RunError

PAIRS = {  # format -> the engines that load it on a processor
    "compressed-tensors": ("transformers",),
    "gguf": ("llama.cpp", "transformers"),
    "mlx": ("mlx",),
    "gptq": ("gptqmodel",),
    "awq": ("transformers",),
    "auto-round": ("auto-round",),
    "onnx": ("onnxruntime",),
    "gemma": ("transformers",),
}
GATED = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 512}),
    "qwen3_moe": ("Qwen3MoeConfig", {"moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2}),
}
GRIDS = {
    "w4g64": {"num_bits": 4, "group_size": 64, "symmetric": True},
    "w4g64 asym": {"num_bits": 4, "group_size": 64, "symmetric": False},
    "w2g64": {"num_bits": 2, "group_size": 64, "symmetric": True},
    "w4pc": {
        "num_bits": 4,
        "group_size": -1,
        "symmetric": True,
    },  # what the format gemma holds
}


def random_model(name: str, folder: Path) -> Path:
    """Write a small random model of a family, with the tokenizer of the built-in model."""
    kind, changes = RANDOM[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(GATED | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.save_pretrained(folder)
    builtin = Path(qtool.__file__).parent / "models" / "builtin" / "wiki-llama-3m"
    transformers.AutoTokenizer.from_pretrained(builtin, trust_remote_code=False).save_pretrained(folder)
    return folder


def cells(model: str, work: Path, grids: list[str], text: Text) -> Iterator[tuple[str, ...]]:
    """Yield a row for each grid, format and engine of a model."""
    path = str(random_model(model, work / "float") if model in RANDOM else model_folder(model))
    for label in grids:
        made = work / label.replace(" ", "-")
        recipe = {"model": {"path": path}, "method": {"name": "rtn", "range": "search"}, "output": {"path": str(made)}}
        qtool.quantize({**recipe, "quant": GRIDS[label]})
        for name, engines in PAIRS.items():
            if (name == "gemma") != (label == "w4pc"):
                continue
            out = made.with_name(f"{made.name}-{name}")
            try:
                export(made, check_export({"format": name, "path": str(out)}), False)
            except InputError as error:
                yield model, label, name, "-", "refused", "-", "-", str(error).rpartition(": ")[2][:80]
                continue
            for engine in engines:
                yield model, label, name, *_verified(out, made, engine, text)


def _verified(out: Path, made: Path, engine: str, text: Text) -> tuple[str, ...]:
    try:
        found = verify_export(out, against=made, engine=engine, text=text)
    except (InputError, RunError) as error:
        return engine, "-", "-", "-", " ".join(str(error).split())[:100]
    assert found.against is not None
    run = found.engines[0]
    equal = f"{found.against.weights} equal" if found.against.ok else "DIFFER"
    figures = f"{run.logit_difference:.1e}", f"{run.perplexity:.4f} / {run.torch_perplexity:.4f}"
    return run.by, f"{equal} ({found.against.by})", *figures, "" if found.ok else "outside its tolerance"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        "--model",
        nargs="+",
        default=[BUILTIN, *RANDOM],
        help=f"{', '.join(NAMES)}, {', '.join(RANDOM)}, or folders",
    )
    parser.add_argument("--grids", nargs="+", default=[*GRIDS], choices=GRIDS)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()
    os.environ.setdefault("QTOOL_TRANSFORMERS_PYTHON", sys.executable)
    print("| model | grid | format | engine | weights | logits differ by | perplexity, torch's | |\n|" + "---|" * 8)
    text = Text("wikitext2", args.windows, args.context)
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            for row in cells(model, Path(folder) / Path(model).name, args.grids, text):
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
