"""Seconds and memory of methods, and the speed of decoding, on blocks of the shape of Llama-2 7B: run by ``gpu.sh``.

The model is random (``random_llama.py``), as neither time nor memory depends on the values of weights, and so are the
tokens. Methods run as recipes, each in a process of its own; their reports have the seconds and the peaks. Trainings
run twice, with few and with more steps, so that the seconds of a step are the slope. ``qtool bench`` measures decoding.
What fails, or does not fit the time, has a row that says so. No GPU was at hand when this was written: only ``--cpu
--tiny`` was run, which takes the same path but for the device and the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtool.system.environment import environment

HERE = Path(__file__).parent
BUDGET = 570.0  # seconds of the whole run
W4: dict[str, Any] = {"num_bits": 4, "group_size": 128}
W2: dict[str, Any] = {"num_bits": 2, "group_size": 64, "symmetric": False}
PC: dict[str, Any] = {"num_bits": 4, "group_size": -1}


@dataclass(frozen=True)
class Scale:
    """Shape of the model, the windows, and the steps of the shorter and the longer run of a training."""

    hidden: int
    mlp: int
    kv_heads: int
    blocks: int
    windows: int
    length: int
    steps: tuple[int, int]
    new_tokens: int


FULL = Scale(hidden=4096, mlp=11008, kv_heads=64, blocks=4, windows=32, length=2048, steps=(4, 16), new_tokens=32)
TINY = Scale(hidden=128, mlp=256, kv_heads=2, blocks=2, windows=8, length=64, steps=(2, 6), new_tokens=4)


@dataclass
class Row:
    """One measurement: its wall seconds, and what was found."""

    name: str
    wall_s: float = 0.0
    found: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Bench:
    """The measurements of one run, in a folder; ``rows`` are those so far."""

    def __init__(self, output: Path, scale: Scale, device: str, budget: float) -> None:
        """Begin in the folder ``output``, whose subfolder ``work`` is replaced."""
        self.output, self.scale, self.device = output, scale, device
        self.work = output.resolve() / "work"
        self.end = time.monotonic() + budget
        self.rows: list[Row] = []
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)

    def child(self, name: str, command: list[str]) -> Row:
        """Run a command, keep its output in ``<name>.log``, and add its row."""
        row = Row(name)
        self.rows.append(row)
        left, start = self.end - time.monotonic(), time.monotonic()
        log = self.work / f"{name.replace(' ', '-')}.log"
        print(f"{name} ...", flush=True)
        if left < 5:
            row.error = "not run: no time was left"
            return row
        with log.open("w") as output:
            try:
                done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=left, check=False)
                row.error = "" if done.returncode == 0 else f"exit code {done.returncode}: {last_line(log)}"
            except subprocess.TimeoutExpired:
                row.error = "stopped: no time was left"
        row.wall_s = time.monotonic() - start
        return row

    def quantized(self, name: str, method: dict[str, Any], quant: dict[str, Any], windows: int, length: int) -> Row:
        """Quantize by a recipe; the row has the seconds of the method, and the peaks, in bytes."""
        out, tokens = self.work / name.replace(" ", "-"), self.work / f"{windows}x{length}.npy"
        if not tokens.exists():
            np.save(tokens, np.random.default_rng(0).integers(0, 4096, (windows, length)))
        recipe = {
            "model": {"path": str(self.work / "model" / "float"), "dtype": "bfloat16", "device": self.device},
            "method": method,
            "quant": quant,
            "data": {"source": str(tokens), "num_samples": windows, "seq_len": length},
            "output": {"path": str(out)},
        }
        file = out.with_suffix(".yaml")
        file.write_text(json.dumps(recipe, indent=1), encoding="utf-8")  # JSON is YAML
        known = {"efficientqat": "efficientqat", "lrqat": "lrqat"}
        row = self.child(name, [sys.executable, "-m", "qtool", known.get(method["name"], "ptq"), str(file), "-q"])
        if not row.error:
            report = json.loads((out / "report.json").read_text(encoding="utf-8"))
            row.found["quantize_s"] = report["seconds"]["quantize"]
            row.found["peak_bytes"] = max(report["peak_bytes"].values(), default=0)
            row.found["peak_gpu_bytes"] = max(report["peak_gpu_bytes"].values(), default=0)
        return row

    def trained(self, name: str, method: dict[str, Any], quant: dict[str, Any], batch: int, length: int) -> None:
        """Train with few and with more steps, and add the seconds of a step to the second row."""
        few, many = self.scale.steps
        rows = []
        for steps in (few, many):
            own = {"min_steps": steps, "epochs": 1e-9} if method["name"] == "efficientqat" else {"steps": steps}
            rows.append(self.quantized(f"{name} {steps} steps", method | own, quant, batch * 4, length))
        if not any(row.error for row in rows):
            first, second = (row.found["quantize_s"] for row in rows)
            per_step = (second - first) / (many - few)
            rows[1].found["step_s"] = per_step / (self.scale.blocks if method["name"] == "efficientqat" else 1)

    def decoded(self, name: str, folder: str) -> None:
        """Measure decoding of a checkpoint that an earlier row made."""
        backend = "torch" if self.device == "cpu" else "gemlite"
        command = [
            sys.executable,
            "-m",
            "qtool",
            "bench",
            str(self.work / folder),
            "--backend",
            backend,
            "--json",
            "-q",
        ]
        command += ["--device", self.device, "--repeats", "3", "--new-tokens", str(self.scale.new_tokens)]
        row = self.child(name, [*command, "--prompt-tokens", str(min(256, self.scale.length))])
        if not row.error:
            text = (self.work / f"{name.replace(' ', '-')}.log").read_text(encoding="utf-8")
            report = json.loads(text[text.index("{") :])["report"]
            for variant in report["variants"]:
                for measure, speed in variant["speeds"].items():
                    row.found[f"{variant['name']}, {measure}, tokens/s"] = speed["tokens_per_second"]

    def auto_round(self, python: str) -> None:
        """Run AutoRound on the text of SignRound's row, if ``python`` has it."""
        if subprocess.run([python, "-c", "import auto_round"], capture_output=True, check=False).returncode:
            self.rows.append(Row("auto-round w4g128 light", error=f"not run: {python} has no auto-round"))
            return
        tokens = self.work / f"{self.scale.windows}x{self.scale.length}.npy"
        command = [python, str(HERE / "peer_autoround.py"), "quantize", str(self.work / "model" / "float"), str(tokens)]
        command += [str(self.work / "auto-round"), "--num-bits", "4", "--group-size", "128", "--preset", "light"]
        self.child("auto-round w4g128 light", [*command, "--device", self.device])

    def run(self, auto_round_python: str) -> None:
        """Measure all, the most wanted first."""
        scale = self.scale
        make = [sys.executable, str(HERE / "random_llama.py"), str(self.work / "model"), "--grids", ""]
        make += ["--hidden", str(scale.hidden), "--mlp", str(scale.mlp), "--kv-heads", str(scale.kv_heads)]
        if self.child("model", [*make, "--blocks", str(scale.blocks)]).error:
            return
        self.quantized("gptq w4g128", {"name": "gptq"}, W4, scale.windows, scale.length)
        block = {"name": "efficientqat", "init": "minmax", "batch_size": 2, "e2e": {"steps": 0}}
        self.trained("block-ap w2g64", block, W2, 2, scale.length)
        low_rank = {
            "name": "lrqat",
            "loss": "ce",
            "min_steps": 0,
            "batch_size": 4,
            "factors": "zero",
            "range": "minmax",
        }
        low_rank |= {"gradient_checkpointing": True, "validation_samples": 0}
        self.trained("lrqat w4pc", low_rank, PC, 4, scale.length // 2)
        self.decoded("decode w4g128", "gptq-w4g128")
        self.decoded("decode w2g64", f"block-ap-w2g64-{scale.steps[0]}-steps")
        self.quantized(
            "signround w4g128 light", {"name": "signround", "preset": "light"}, W4, scale.windows, scale.length
        )
        self.auto_round(auto_round_python)

    def write(self) -> None:
        """Write ``gpu-bench.json`` and ``gpu-bench.md``, and print the latter."""
        device = torch.cuda.get_device_name() if self.device.startswith("cuda") else "CPU"
        facts = {"device": device, "scale": asdict(self.scale), "environment": environment()}
        whole = facts | {"rows": [asdict(row) for row in self.rows]}
        (self.output / "gpu-bench.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        text = markdown(device, self.scale, self.rows)
        (self.output / "gpu-bench.md").write_text(text, encoding="utf-8")
        print(f"\n{text}")


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def markdown(device: str, scale: Scale, rows: list[Row]) -> str:
    """Return the tables of methods and of decoding."""
    lines = [
        f"{device}; {scale.blocks} blocks of hidden {scale.hidden}, MLP {scale.mlp}; {scale.windows} windows of "
        f"{scale.length} tokens for methods without steps. A step of Block-AP is of one block, of LR-QAT of all.",
        "",
        "| run | wall s | quantize s | s per block | s per step | peak GPU MB | peak MB | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        found = row.found
        if not row.name.startswith("decode"):
            seconds = found.get("quantize_s")
            cells = [f"{row.wall_s:.1f}"]
            cells += [
                "" if seconds is None else f"{seconds:.2f}",
                "" if seconds is None else f"{seconds / scale.blocks:.2f}",
            ]
            cells.append(f"{found['step_s']:.4f}" if "step_s" in found else "")
            cells += [f"{found[key] / 1e6:.0f}" if found.get(key) else "" for key in ("peak_gpu_bytes", "peak_bytes")]
            lines.append(f"| {row.name} | {' | '.join(cells)} | {row.error} |")
    lines += ["", "| decoding | tokens/s | |", "|---|---:|---|"]
    for row in rows:
        if row.name.startswith("decode"):
            lines += [
                f"| {row.name}: {key.removesuffix(', tokens/s')} | {value:.1f} | |" for key, value in row.found.items()
            ]
            lines += [f"| {row.name} | | {row.error} |"] if row.error else []
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write, and return 1 if any row has an error other than a package that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-bench"))
    parser.add_argument("--cpu", action="store_true", help="measure the CPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this program")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of the whole run")
    parser.add_argument("--keep", action="store_true", help="keep the model and the checkpoints in OUTPUT/work")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; use --cpu, with --tiny to try this program")
    if not args.cpu and find_spec("gemlite") is None:
        print("gemlite is not installed: decoding will have no row; pip install gemlite", file=sys.stderr)
    bench = Bench(args.output, TINY if args.tiny else FULL, "cpu" if args.cpu else "cuda:0", args.budget)
    bench.run(os.environ.get("AUTO_ROUND_PYTHON", sys.executable))
    bench.write()
    if not args.keep:
        shutil.rmtree(bench.work)
    return int(any(row.error and not row.error.startswith("not run") for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
