"""Quantize one model with several methods in memory, and print what each costs in quality.

    python examples/compare_methods.py [MODEL] [--bits 3] [--windows 64]

MODEL is a folder or a name on the hub; left out, it is the model that comes with qtool, and nothing is downloaded. The
calibration text is written by the model itself, so no data set is needed.
"""

import argparse
import time
from importlib.resources import files

from transformers import AutoModelForCausalLM, AutoTokenizer

import qtool

METHODS = ("rtn", "hqq", "gptq", "awq")


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(files("qtool.models") / "builtin" / "wiki-llama-3m"))
    parser.add_argument("--bits", type=int, default=3, choices=(2, 3, 4, 8))
    parser.add_argument("--windows", type=int, default=64, help="Windows of calibration text, of 256 tokens each.")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    reference = AutoModelForCausalLM.from_pretrained(args.model)
    print(f"{'method':8} {'kl, nats':>18} {'top-1 agreement':>16} {'seconds':>8}")
    for method in METHODS:
        model = AutoModelForCausalLM.from_pretrained(args.model)
        started = time.perf_counter()
        qtool.quantize_model(model, tokenizer, method, num_bits=args.bits, num_samples=args.windows, seq_len=256)
        seconds = time.perf_counter() - started
        report = qtool.evaluate(model, ["kl"], reference=reference, tokenizer=tokenizer, limit=16, context=256)
        rows = {row.metric: row for row in report.results}
        kl, agreement = rows["kl"], rows["top-1 agreement"]
        error = "" if kl.stderr is None else f" ± {kl.stderr:.4f}"
        print(f"{method:8} {f'{kl.value:.4f}{error}':>18} {agreement.value:>16.3f} {seconds:8.1f}")


if __name__ == "__main__":
    main()
