"""Compare what ``qtool plan`` predicts with what runs of the built-in model take: size, peak memory and time.

    python scripts/bench/plan_predictions.py [RUN ...] [--model MODEL]

Each run is predicted first and made then, in processes of their own; both read WikiText-2 from ``QTOOL_DATA_DIR``. It
prints a Markdown table with a row for each run. The machine must be quiet: a probe of seconds is extrapolated.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from real_models import add_model, chosen

RUNS = {
    "rtn w4g64": ["method.name=rtn", "quant.num_bits=4"],
    "gptq w3g64": ["method.name=gptq", "quant.num_bits=3"],
    "awq w4g64": ["method.name=awq", "quant.num_bits=4"],
    "signround w4g64, light": ["method.name=signround", "method.preset=light", "quant.num_bits=4"],
    "efficientqat w2g64, small": [
        *("method.name=efficientqat", "method.epochs=1", "method.e2e.steps=32", "quant.num_bits=2"),
        *("quant.symmetric=false", "data.num_samples=64"),
    ],
}
COMMAND = {"efficientqat": "efficientqat"}  # of a method; the others run as ptq


def qtool(*arguments: str) -> Any:  # Any: the JSON of a command
    """Return what a command prints with ``--json``."""
    command = [sys.executable, "-m", "qtool", *arguments, "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def row(name: str, model: Path, folder: Path) -> list[str]:
    """Predict and make one run; return the cells of its row."""
    changes = ["eval=null", "data.source=wikitext2", f"output.path={folder / 'out'}", *RUNS[name]]
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {json.dumps(str(model))}}}\n"
        "method: {name: rtn}\n"
        "quant: {group_size: 64, embedding: {num_bits: 8}}\n"
        "data: {num_samples: 128, seq_len: 512}\noutput: {path: out}\n"
    )
    given = [part for change in changes for part in ("--set", change)]
    plan = qtool("plan", str(recipe), *given)
    report = qtool(COMMAND.get(name.split()[0], "ptq"), str(recipe), *given)["report"]
    taken, predicted = sum(report["seconds"].values()), sum(plan["cost"]["seconds"].values())
    pairs = [
        (plan["sizes"][0]["num_bytes"] / 1e6, report["quantized_bytes"] / 1e6, ".3f"),
        (plan["cost"]["peak_bytes"] / 1e6, max(report["peak_bytes"].values()) / 1e6, ".0f"),
        (predicted, taken, ".1f"),
    ]
    cells = [f"{ours:{form}} / {real:{form}} ({100 * (ours / real - 1):+.1f} %)" for ours, real, form in pairs]
    return [name, *cells, f"{plan['cost']['probe_seconds']:.0f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=[*RUNS], help="default: all")
    add_model(parser)
    args = parser.parse_args()
    model = chosen(args)
    print(
        "| run | MB, predicted / written | peak MB | seconds | probe, s |\n| --- | --- | --- | --- | ---: |", flush=True
    )
    for name in args.runs:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {' | '.join(row(name, model, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    main()
