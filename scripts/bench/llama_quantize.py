"""Quantize a float GGUF file with llama.cpp, or measure the perplexity of a file in its engine.

Run by an interpreter that has llama-cpp-python and numpy (0.3.36 was used), and not qtool:

    <python of that environment> llama_quantize.py quantize FLOAT.gguf OUT.gguf Q2_K IMATRIX.npz [--pure]
    <python of that environment> llama_quantize.py perplexity FILE.gguf WINDOWS.npy

``IMATRIX.npz`` has for each tensor of the file the mean square of its input channels, which is what llama.cpp's own
``llama-imatrix`` collects. ``WINDOWS.npy`` int64 ``[n, t]`` holds tokens; every token but the first of a window counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from pathlib import Path

import llama_cpp
import numpy as np


def quantize(source: Path, out: Path, kind: str, imatrix: Path, table: str, pure: bool) -> None:
    """Write ``out``; tensors of the same name as an array of ``imatrix`` are quantized with its weights."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1, pure
    params.token_embedding_type = {"Q6_K": 14, "Q8_0": 8}[table]  # ggml's numbers
    arrays = {name: np.ascontiguousarray(values, np.float32) for name, values in np.load(imatrix).items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # the last one, without a name, ends the list
    for entry, (name, values) in zip(entries, arrays.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantize {source}: code {code}")


def perplexity(file: Path, windows: Path) -> float:
    """Return the perplexity of ``file`` on the windows of tokens."""
    tokens = np.load(windows)
    length = tokens.shape[1]
    model = llama_cpp.Llama(str(file), n_ctx=length, n_batch=length, n_threads=1, logits_all=True, verbose=False)
    total = 0.0
    for window in tokens:
        model.reset()
        model.eval(window.tolist())
        logits = np.array(model.scores[: length - 1], dtype=np.float64)
        logits -= logits.max(1, keepdims=True)
        chosen = logits[np.arange(length - 1), window[1:]]
        total += float((np.log(np.exp(logits).sum(1)) - chosen).sum())
    return math.exp(total / (len(tokens) * (length - 1)))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("quantize")
    for name in ("source", "out", "kind", "imatrix"):
        made.add_argument(name, type=str if name == "kind" else Path)
    made.add_argument("--table", default="Q6_K", choices=["Q6_K", "Q8_0"], help="the embedding's type, as in a mixture")
    made.add_argument("--pure", action="store_true", help="one type for all, instead of a mixture")
    measured = commands.add_parser("perplexity")
    measured.add_argument("file", type=Path)
    measured.add_argument("windows", type=Path)
    args = parser.parse_args()
    if args.command == "quantize":
        quantize(args.source, args.out, args.kind, args.imatrix, args.table, args.pure)
    else:
        print(json.dumps({"perplexity": perplexity(args.file, args.windows)}))


if __name__ == "__main__":
    main()
