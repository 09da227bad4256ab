"""Logits of a plain model folder, and tokens of a text, as transformers 4 computes them in float32.

Run by an interpreter that has transformers 4 and safetensors:

    <python of that environment> witness_transformers4.py FOLDER WITNESS.safetensors [--text FILE]

The written file holds `tokens` int64 [b, t], `logits` float32 [b, t, vocabulary], and with `--text` the `text_tokens`
int64 [n] that the folder's tokenizer makes of the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with a float model")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--text", type=Path, help="a text to read")
    args = parser.parse_args()
    assert transformers.__version__.startswith("4."), transformers.__version__
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, 64), generator=generator)
    with torch.inference_mode():
        witness = {"tokens": tokens, "logits": model(input_ids=tokens).logits.contiguous()}
    if args.text is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder, trust_remote_code=False)
        witness["text_tokens"] = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
    save_file(witness, args.output, metadata={"transformers": transformers.__version__})
    print(args.output)


if __name__ == "__main__":
    main()
