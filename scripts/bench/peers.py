"""A method of qtool beside the same method of other tools: one model, the same calibration tokens, one measure.

    python scripts/bench/peers.py --gptqmodel-python PYTHON --llmcompressor-python PYTHON --json peers.json
    python scripts/bench/peers.py --method signround --auto-round-python PYTHON [--bits 2 --asymmetric]
    python scripts/bench/peers.py --method signround --preset best --beside efficientqat --auto-round-python PYTHON

Each peer lives in an environment of its own (their pins do not agree); give the path of its interpreter, or leave a
peer out. What is compared:

* Cost: the whole process its user starts (import, load, read the tokens or text, quantize, save), as the kernel counts
  it: wall seconds, CPU seconds, peak resident memory. Runs are interleaved (A B C A B C) so that a busy machine
  slows all alike, and an unmeasured run of each comes first: it fills caches and lets a peer compile its extensions.
* Quality: WikiText-2 test perplexity and the divergence from the float model, in float32. A peer's own reader unpacks
  its result; the weights then go into one plain transformers model, so that no tool is helped or hurt by the kernel
  that happens to serve it. Rounding moves a perplexity by chance, so every repeat calibrates on text of its own and the
  mean over repeats is given.

Calibration is GPTQ's usual, weights are in groups and symmetric unless an option says otherwise, and each tool's
defaults hold for all else. Peers get token windows; qtool gets the text that these were cut from: articles in order,
the end token after each.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from child_cost import wait
from real_models import add_model, chosen

# No torch in this process: Linux counts the memory of the process that starts a child into the child's own peak.


PEERS = {"gptq": ("gptqmodel", "llmcompressor"), "signround": ("auto-round",)}  # method -> packages that have it
TRAINED = ("efficientqat", "lrqat")  # methods whose command has their name


@dataclass(frozen=True)
class Tool:
    """A tool to compare: the name of its package, its interpreter, and its child program (qtool has none)."""

    name: str
    python: str
    program: Path | None = None
    method: str = ""  # set for qtool only

    @property
    def label(self) -> str:
        """The name that tables show."""
        return f"{self.name} {self.method}".rstrip()


@dataclass(frozen=True)
class Text:
    """A calibration set."""

    tokens: Path  # .npy int64 [num_samples, seq_len], for the peers
    text: Path  # .jsonl of {"text": article} that tokenizes to the same windows, for qtool


@dataclass(frozen=True)
class Job:
    """The quantization that every tool does."""

    model: Path
    calibration: Text
    num_samples: int
    seq_len: int
    num_bits: int
    group_size: int
    symmetric: bool
    method: str  # the method of the peers
    preset: str  # SignRound's preset


@dataclass(frozen=True)
class Cost:
    """The time and memory that one child process used."""

    wall_s: float
    cpu_s: float  # user and system
    peak_mb: float  # 10**6 bytes; if a tool starts several processes, the largest one


def prepare(model: Path, data: Path, work: Path, num_samples: int, seq_len: int, draws: int) -> list[Text]:
    """Cut calibration sets from one text, one after another."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    articles = iter(lzma.decompress((data / "enwiki" / "train.txt.xz").read_bytes()).decode().split("\n\n\n"))
    return [cut(articles, tokenizer, work / f"calibration{i}", num_samples, seq_len) for i in range(draws)]


def cut(articles: Iterator[str], tokenizer: Any, stem: Path, num_samples: int, seq_len: int) -> Text:
    """Write a calibration set twice: as windows (.npy), and as the text that gives exactly these windows (.jsonl)."""
    import numpy as np

    needed = num_samples * seq_len
    texts: list[str] = []
    tokens: list[int] = []
    for article in articles:
        text, encoded, missing = article, tokenizer(article, return_offsets_mapping=True), needed - len(tokens)
        ids = encoded.input_ids
        if len(ids) > missing + 16:
            # Cut the last article a few tokens past the last window, so that the text holds no further window.
            text = article[: encoded.offset_mapping[missing + 16][1]]
            ids = tokenizer(text).input_ids
            if ids[:missing] != encoded.input_ids[:missing]:
                raise ValueError(f"article {len(texts)} cut at character {len(text)} starts with other tokens")
        texts.append(text)
        tokens += [*ids, tokenizer.eos_token_id]
        if len(tokens) >= needed:
            break
    else:
        raise ValueError(f"{len(tokens)} tokens of calibration text are left for {stem.name}, {needed} are needed")

    made = Text(stem.with_suffix(".npy"), stem.with_suffix(".jsonl"))
    np.save(made.tokens, np.array(tokens[:needed], dtype=np.int64).reshape(num_samples, seq_len))
    made.text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return made


def quality(
    model_dir: Path, weights_file: Path | None, float_dir: Path, text_file: Path, eval_len: int, num_windows: int
) -> tuple[float, float]:
    """Return the perplexity and the mean KL(float || model), in nats per token, on windows of a WikiText .jsonl.

    Windows are disjoint; each predicts ``eval_len - 1`` tokens. ``num_windows`` 0 takes every full one.
    ``weights_file`` has dense weights that replace those of ``model_dir``.
    """
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import nll_loss
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if json.loads((model_dir / "config.json").read_text()).get("quantization_config"):
        import qtool  # noqa: F401 - teaches transformers to load qtool's folders
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, trust_remote_code=False
    )  # in evaluation mode
    reference = AutoModelForCausalLM.from_pretrained(float_dir, dtype=torch.float32, trust_remote_code=False)
    if weights_file is not None:
        for name, weight in load_file(weights_file).items():
            model.get_parameter(name).data.copy_(weight)
    with text_file.open(encoding="utf-8") as lines:
        rows = [json.loads(line)["text"] for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    tokens = tokenizer("\n\n".join(rows), return_tensors="pt", verbose=False).input_ids[0]
    windows = tokens[: len(tokens) // eval_len * eval_len].reshape(-1, eval_len)[: num_windows or None]

    total, divergence = 0.0, 0.0
    with torch.inference_mode():
        for window in windows.split(1):
            mine, other = (each(input_ids=window).logits[0, :-1].log_softmax(-1) for each in (model, reference))
            total += nll_loss(mine, window[0, 1:], reduction="sum").item()
            divergence += torch.linalg.vecdot(other.exp(), other - mine).sum().item()
    count = len(windows) * (eval_len - 1)
    return math.exp(total / count), divergence / count


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a fresh process, to keep what it imports out of this one."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def child_environment() -> dict[str, str]:
    """Return this environment without the hub, and with the worker count that GPTQModel needs on a small machine."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return environment if (os.cpu_count() or 1) >= 4 else {"GPTQMODEL_CPU_WORKERS": "2"} | environment


def run_child(command: list[str], log: Path) -> Cost:
    """Run a command and return its cost. Raise RuntimeError, with the end of its log, if it failed."""
    with log.open("wb") as output:
        start = time.perf_counter()
        # In the log's folder: GPTQModel writes logs/ wherever it is started.
        child = subprocess.Popen(command, stdout=output, stderr=output, env=child_environment(), cwd=log.parent)
        cpu_seconds, peak_bytes = wait(child)
        wall = time.perf_counter() - start
    if child.returncode != 0:
        raise RuntimeError(f"{command} ended with {child.returncode}:\n{log.read_text(errors='replace')[-2000:]}")
    return Cost(wall, cpu_seconds, peak_bytes / 1e6)


def quantize(tool: Tool, job: Job, output: Path) -> Cost:
    """Have a tool quantize into the new folder ``output``."""
    shutil.rmtree(output, ignore_errors=True)
    if tool.program is None:
        recipe = {
            "model": {"path": str(job.model)},
            "method": {"name": tool.method} | ({"preset": job.preset} if tool.method == "signround" else {}),
            "quant": {"num_bits": job.num_bits, "group_size": job.group_size, "symmetric": job.symmetric},
            "data": {"source": str(job.calibration.text), "num_samples": job.num_samples, "seq_len": job.seq_len},
            "output": {"path": str(output)},
            "seed": 0,
        }
        recipe_file = output.with_suffix(".yaml")
        recipe_file.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
        command = [tool.python, "-m", "qtool", tool.method if tool.method in TRAINED else "ptq", str(recipe_file)]
    else:
        command = [tool.python, str(tool.program), "quantize", str(job.model), str(job.calibration.tokens), str(output)]
        command += ["--num-bits", str(job.num_bits), "--group-size", str(job.group_size)]
        if job.method == "signround":
            command += ["--preset", job.preset, *([] if job.symmetric else ["--asymmetric"])]
    return run_child(command, output.with_suffix(".log"))


def expand(tool: Tool, job: Job, output: Path) -> tuple[Path, Path | None]:
    """Return a model folder and, for a peer, the file of dense weights that replace the folder's own."""
    if tool.program is None:
        return output, None
    dense_file = output.with_suffix(".dense.safetensors")
    command = [tool.python, str(tool.program), "expand", str(output), str(dense_file)]
    run_child(command, output.with_suffix(".expand.log"))
    return job.model, dense_file


def versions(tool: Tool) -> dict[str, str]:
    """Return the versions of the packages that a result depends on, in the tool's own environment."""
    own = "qtool.__version__" if tool.program is None else f"version({tool.name!r})"  # qtool may run from a checkout
    start = "import qtool; " if tool.program is None else ""
    ask = f"{start}from importlib.metadata import version; print({own}, version('torch'), version('transformers'))"
    answer = subprocess.run([tool.python, "-c", ask], check=True, capture_output=True, text=True).stdout
    return dict(zip((tool.name, "torch", "transformers"), answer.split(), strict=True))


def cpu_name() -> str:
    """Return the processor's name."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(float_perplexity: float, rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table; times are medians."""
    reference = {row["num_bits"]: row["median"]["wall_s"] for row in rows if row["tool"] == rows[0]["tool"]}
    lines = [
        "| tool | bits | perplexity | KL | wall s | CPU s | peak MB | wall / first |",
        "|---|---|---|---|---|---|---|---|",
        f"| none | float | {float_perplexity:.2f} | | | | | |",
    ]
    for row in rows:
        cost, base = row["median"], reference.get(row["num_bits"])
        ratio = f"{cost['wall_s'] / base:.2f}" if base else ""
        lines.append(
            f"| {row['tool']} | {row['num_bits']} | {row['perplexity']:.2f} | {row['kl']:.4f} "
            f"| {cost['wall_s']:.1f} | {cost['cpu_s']:.1f} | {cost['peak_mb']:.0f} | {ratio} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    data = Path(os.environ.get("QTOOL_DATA_DIR", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=sorted(PEERS), default="gptq")
    parser.add_argument("--gptqmodel-python", help="interpreter that has gptqmodel")
    parser.add_argument("--llmcompressor-python", help="interpreter that has llmcompressor")
    parser.add_argument("--auto-round-python", help="interpreter that has auto-round")
    parser.add_argument("--preset", choices=["light", "default", "best"], default="default", help="preset of signround")
    parser.add_argument(
        "--beside", nargs="+", default=[], choices=TRAINED, help="other methods of qtool, with defaults"
    )
    parser.add_argument("--no-qtool", action="store_true", help="measure the peers only")
    parser.add_argument("--data", type=Path, default=data, help="with enwiki/ and wikitext2/ (default: QTOOL_DATA_DIR)")
    add_model(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true", help="asymmetric grids; signround only")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--eval-len", type=int, default=1024, help="tokens in an evaluation window")
    parser.add_argument("--eval-windows", type=int, default=0, help="evaluate on the first N windows; 0: all")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="measured runs of each tool at each width, each on calibration text of its own",
    )
    parser.add_argument("--warm-ups", type=int, default=1, help="unmeasured runs of each tool before the first width")
    parser.add_argument("--work", type=Path, help="keep results and logs in this folder (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args()
    if args.asymmetric and args.method != "signround":
        parser.error("--asymmetric is for --method signround")
    return args


def compare(args: argparse.Namespace, tools: list[Tool], work: Path) -> dict[str, Any]:
    """Run all tools and return their cost and quality."""
    model, wikitext = chosen(args).resolve(), args.data / "wikitext2" / "test.jsonl"
    texts = apart(prepare, model, args.data, work, args.num_samples, args.seq_len, args.repeats)
    found_versions = {tool.name: versions(tool) for tool in tools}
    rows: list[dict[str, Any]] = []
    for num_bits in args.bits:
        costs: dict[Tool, list[Cost]] = {tool: [] for tool in tools}
        qualities: dict[Tool, list[tuple[float, float]]] = {tool: [] for tool in tools}
        warm_ups = args.warm_ups if num_bits == args.bits[0] else 0
        for repeat in range(-warm_ups, args.repeats):
            text, shape = texts[max(repeat, 0)], (args.num_samples, args.seq_len)
            job = Job(model, text, *shape, num_bits, args.group_size, not args.asymmetric, args.method, args.preset)
            outputs = {tool: work / f"{tool.label.replace(' ', '-')}-w{num_bits}-{max(repeat, 0)}" for tool in tools}
            measured = {tool: quantize(tool, job, output) for tool, output in outputs.items()}
            if repeat < 0:
                continue
            for tool, output in outputs.items():
                folder, weights = expand(tool, job, output)
                found = apart(quality, folder, weights, model, wikitext, args.eval_len, args.eval_windows)
                costs[tool].append(measured[tool])
                qualities[tool].append(found)
                took = f"{measured[tool]}, perplexity {found[0]:.2f}, KL {found[1]:.4f}"
                done = f"w{num_bits} run {repeat + 1} {tool.label}: {took}"
                print(done, file=sys.stderr, flush=True)
        for tool in tools:
            runs = [asdict(cost) for cost in costs[tool]]
            median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            perplexities, divergences = zip(*qualities[tool], strict=True)
            row = {"tool": tool.label, "num_bits": num_bits, "perplexity": statistics.mean(perplexities)}
            row |= {"kl": statistics.mean(divergences), "perplexities": perplexities, "kls": divergences}
            rows.append(row | {"median": median, "runs": runs})
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "versions": found_versions,
        "settings": {name: value for name, value in vars(args).items() if isinstance(value, int | list)}
        | {"method": args.method, "preset": args.preset},
        "float_perplexity": apart(quality, model, None, model, wikitext, args.eval_len, args.eval_windows)[0],
        "results": rows,
    }


def main() -> None:
    args = parse()
    own = [] if args.no_qtool else [args.method, *args.beside]
    tools = [Tool("qtool", sys.executable, method=method) for method in own]
    for name in PEERS[args.method]:
        if python := getattr(args, f"{name.replace('-', '_')}_python"):
            python = os.path.abspath(shutil.which(python) or python)  # not resolved: a venv's is a link
            program = f"peer_{name.replace('-', '')}.py"
            tools.append(Tool(name, python, Path(__file__).resolve().with_name(program)))
    if not tools:
        raise SystemExit("nothing to measure: --no-qtool and no peer's interpreter")
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        outcome = compare(args, tools, work)
    print(table(outcome["float_perplexity"], outcome["results"]))
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=1) + "\n")


if __name__ == "__main__":
    main()
