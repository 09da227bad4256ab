"""Perplexity in llama.cpp's engine: qtool on GGUF's grids beside llama.cpp's own quantization of the same weights.

    python scripts/bench/gguf_quality.py [--model FOLDER] [--grids q2_k q4_k] [--methods rtn gptq efficientqat] \
        --engine <python with llama-cpp-python>

llama.cpp quantizes the float weights with an importance matrix of the calibration text that qtool reads: the mean
square of each input channel, which is what ``llama-imatrix`` collects. Both write the same types: one type for all
linears ("pure", with llama.cpp's types of shorter blocks where 256 does not divide a row), or the mixture that
llama.cpp calls K_M (``--mixture``). Perplexity is that of the engine, on the first windows of WikiText-2.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_models import add_model, chosen
from torch import nn

import qtool
from qtool.config.sections import DataConfig, ModelConfig
from qtool.data import windows
from qtool.exporters import gguf
from qtool.exporters._folder import skeleton
from qtool.models.loading import load_model

HERE = Path(__file__).parent
FILE_TYPES = {"q2_k": "Q2_K", "q3_k": "Q3_K_M", "q4_k": "Q4_K_M", "q5_k": "Q5_K_M"}  # of llama.cpp, by our grid
SHORT = {"q2_k": {"num_bits": 4, "group_size": 32}, "q4_k": {"num_bits": 4, "group_size": 32, "symmetric": False}}
"""Grids of rows that 256 does not divide: Q4_0 and Q5_0, which llama.cpp takes there."""


def float_file(folder: Path, out: Path) -> Path:
    """Write the float model in ``folder`` as a GGUF file."""
    loaded = load_model(ModelConfig(path=str(folder), dtype="auto", device="cpu"))
    out.mkdir(parents=True, exist_ok=True)
    writer, state = gguf.begun(folder, out), loaded.model.state_dict()
    if loaded.model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    gguf.add_floats(writer, folder, state)
    gguf.finish(writer, out)
    return out / gguf.FILE


@torch.no_grad()
def importance(folder: Path, data: DataConfig, out: Path) -> Path:
    """Write the mean square of the input channels of each linear, under the names of its tensors in the file."""
    loaded = load_model(ModelConfig(path=str(folder), dtype="float32", device="cpu"))
    there, sums = gguf.tensor_map(folder), dict[str, torch.Tensor]()
    tokens = windows.calibration(data, loaded, 0).tokens

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: Any) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + args[0].float().flatten(0, -2).square().sum(0)

        return add

    for name, module in loaded.model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in there and name != "lm_head":
            module.register_forward_pre_hook(hook(there[f"{name}.weight"]))
    for window in tokens:
        loaded.model(window.unsqueeze(0))
    arrays = {name: (total / tokens.numel()).numpy() for name, total in sums.items()}
    np.savez(out, allow_pickle=False, **arrays)
    return out


def engine(python: str, *args: object) -> str:
    """Run ``llama_quantize.py`` in the engine's environment, and return what it prints."""
    command = [python, str(HERE / "llama_quantize.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout


def grids(folder: Path, grid: str, mixture: bool) -> dict[str, Any]:
    """Return the section ``quant`` of a run: the types that llama.cpp gives the tensors of the model."""
    if mixture:
        return {"grid": grid}
    model: Any = skeleton(folder)
    columns = {name: module.in_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    short = {
        name: {"grid": "affine", "symmetric": True, **SHORT[grid]}
        for name, size in columns.items()
        if size % 256 and name != "lm_head"
    }
    table = {"grid": "q6_k"} if model.config.hidden_size % 256 == 0 else {"num_bits": 8, "group_size": 32}
    return {"grid": grid, "overrides": short, "embedding": table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--engine", required=True, help="an interpreter with llama-cpp-python")
    parser.add_argument("--grids", nargs="+", default=["q2_k", "q4_k"], choices=FILE_TYPES)
    parser.add_argument("--methods", nargs="*", default=["rtn", "gptq", "efficientqat"])
    parser.add_argument("--checkpoints", nargs="*", default=[], help="GRID=FOLDER of gguf exports")
    parser.add_argument("--mixture", action="store_true")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("out/gguf-quality"))
    args = parser.parse_args()
    args.folder = chosen(args)
    data = DataConfig(source="enwiki", num_samples=args.samples, seq_len=args.seq_len)
    args.work.mkdir(parents=True, exist_ok=True)
    loaded = load_model(ModelConfig(path=str(args.folder), dtype="float32", device="cpu"))
    tokens = windows.perplexity_windows("wikitext2", loaded, args.context, args.windows, 0)
    np.save(args.work / "windows.npy", tokens.numpy())
    float_gguf, matrix = float_file(args.folder, args.work / "float"), args.work / "imatrix.npz"
    importance(args.folder, data, matrix)
    rows = [row("float", float_gguf, args)]
    for grid in args.grids:
        out = args.work / f"llama-{grid}.gguf"
        pure = [] if args.mixture else ["--pure"]
        pure += [] if loaded.model.config.hidden_size % 256 == 0 else ["--table", "Q8_0"]
        engine(args.engine, "quantize", float_gguf, out, FILE_TYPES[grid], matrix, *pure)
        rows.append(row(f"{FILE_TYPES[grid]}, llama.cpp with importance matrix", out, args))
        for method in args.methods:
            folder = args.work / f"{method}-{grid}"
            made = qtool.quantize(
                {
                    "model": {"path": str(args.folder), "dtype": "float32"},
                    "method": {"name": method} | ({"range": "search"} if method == "rtn" else {}),
                    "quant": grids(args.folder, grid, args.mixture),
                    "gguf": {"grid": "k_m" if args.mixture else "keep"},
                    "data": data.model_dump(mode="json"),
                    "export": [{"format": "gguf", "path": str(folder) + "-gguf"}],
                    "output": {"path": str(folder), "overwrite": True},
                }
            )
            assert made is not None
            rows.append(row(f"{grid}, qtool {method}", Path(f"{folder}-gguf") / gguf.FILE, args))
        for given in args.checkpoints:
            name, _, path = given.partition("=")
            if name == grid:
                rows.append(row(f"{grid}, {path}", Path(path) / gguf.FILE, args))
    print("| | perplexity in llama.cpp | MB |\n|---|---:|---:|")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


def row(label: str, file: Path, args: argparse.Namespace) -> tuple[str, str, str]:
    """Return the perplexity and the size of ``file``."""
    found = json.loads(engine(args.engine, "perplexity", file, args.work / "windows.npy"))
    print(label, found, file=sys.stderr)
    return label, f"{found['perplexity']:.2f}", f"{file.stat().st_size / 1e6:.2f}"


if __name__ == "__main__":
    main()
