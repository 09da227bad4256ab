"""Logits of a GGUF folder, and tokens of a text, as llama.cpp computes them.

Run by an interpreter that has llama-cpp-python, gguf and safetensors:

    <python of that environment> witness_gguf.py FOLDER WITNESS.safetensors [--float32] [--text FILE] [--texts FILE]

The written file holds `tokens` int64 [1, t], `logits` float32 [1, t, vocabulary], and with `--text` the `text_tokens`
int64 [n] that llama.cpp makes of the file. `--texts` names a JSON list of texts; then the file needs no weights, and
`text_0`, `text_1`, ... int64 [n] are written, without logits.
llama.cpp rounds inputs of quantized linears to 8 bits; `--float32` gives it the dequantized weights in float32 and
keys and values in float32, so that only the order of sums differs, and GELU, which it takes from a table of float16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama
from safetensors.numpy import save_file


def widened(file: Path, out: Path) -> Path:
    """Write `file` with every tensor dequantized to float32 to `out`; the metadata stays."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            writer.add_key_value(key, field.contents(), kind, inner[0] if inner else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with model.gguf")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--float32", action="store_true", help="compute with the dequantized weights in float32")
    parser.add_argument("--text", type=Path, help="a text to read")
    parser.add_argument("--texts", type=Path, help="a JSON list of texts to read, without logits")
    args = parser.parse_args()
    file = args.folder / "model.gguf"
    if args.texts is not None:
        vocabulary = Llama(str(file), vocab_only=True, verbose=False)
        texts = [text.encode("utf-8") for text in json.loads(args.texts.read_text(encoding="utf-8"))]
        found = [vocabulary.tokenize(text, add_bos=True, special=True) for text in texts]
        save_file({f"text_{index}": np.array(ids, np.int64) for index, ids in enumerate(found)}, args.output)
        return
    options = {"n_ctx": 64, "n_batch": 64, "n_threads": 1, "logits_all": True, "verbose": False}
    if args.float32:
        file = widened(file, args.output.with_suffix(".gguf"))
        options |= {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    model = Llama(str(file), **options)
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
