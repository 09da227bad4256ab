"""Logits of a GGUF folder, and tokens of a text, as llama.cpp computes them.

Run by an interpreter that has llama-cpp-python and safetensors:

    <python of that environment> witness_gguf.py FOLDER WITNESS.safetensors [--text FILE]

The written file holds `tokens` int64 [1, t], `logits` float32 [1, t, vocabulary], and with `--text` the `text_tokens`
int64 [n] that llama.cpp makes of the file. llama.cpp rounds inputs of quantized linears to 8 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from llama_cpp import Llama
from safetensors.numpy import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with model.gguf")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--text", type=Path, help="a text to read")
    args = parser.parse_args()
    options = {"n_ctx": 64, "n_batch": 64, "n_threads": 1, "logits_all": True, "verbose": False}
    model = Llama(str(args.folder / "model.gguf"), **options)
    tokens = np.random.default_rng(0).integers(model.n_vocab(), size=48)
    model.eval(tokens.tolist())
    logits = np.array(model.scores[: len(tokens)], dtype=np.float32)
    witness: dict[str, np.ndarray] = {"tokens": tokens[None], "logits": logits[None]}
    if args.text is not None:
        witness["text_tokens"] = np.array(model.tokenize(args.text.read_bytes(), add_bos=True, special=True))
    save_file(witness, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
