"""Methods and grids on small real models: quality, bits, size, time and memory of each, as one table.

    python scripts/bench/real_table.py [--work FOLDER] [--models smollm2-135m gemma3-270m] [--only 'gemma3*/gptq/*']
    python scripts/bench/real_table.py --steps time          # on a quiet machine, after the other steps
    python scripts/bench/real_table.py --row 'gptaq=gptq method.gptaq=0.25' --only '*/gptaq/*'
    python scripts/bench/real_table.py --print               # measures nothing

A cell is a model, a row (a method, and keys that it changes) and a grid, written ``model/row/grid``; ``--only`` takes
patterns of such names. A cell has four steps, each a line of ``results.jsonl`` in the work folder when it is done,
so a stopped run goes on with the step that is missing. Steps run in processes of their own:

* ``quantize`` runs ``qtool``, and keeps the checkpoint;
* ``text`` is the perplexity and the divergence from the float model on the first windows of WikiText-2's test split;
  all cells of a model read them in one process, beside one pass of the float model;
* ``tasks`` are multiple-choice tasks on their first questions, without the float model beside them, which is the row
  ``float`` of its own;
* ``time`` quantizes again, into a folder that is removed, for wall seconds, CPU seconds and peak memory of the process.

``quantize`` records its time too, and the table shows it with a tilde where ``time`` was not run: quality can be
measured on a busy machine, times cannot. Models come from ``real_models.py``, which says what their 4-bit weights mean
for a comparison. The row ``lrqat`` begins with the checkpoint of the row ``gptq``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from child_cost import wait
from real_models import NAMES, SOURCES, NotThere, model_folder

FLOAT = "float"  # the row of the model that is not quantized
GRIDS = {
    "w4g64": {"num_bits": 4, "symmetric": True},
    "w3g64a": {"num_bits": 3, "symmetric": False},
    "w2g64a": {"num_bits": 2, "symmetric": False},
}
ROWS = {"rtn": "rtn", "gptq": "gptq", "awq": "awq", "signround": "signround", "efficientqat": "efficientqat"} | {
    "lrqat": "lrqat method.init_from=@gptq"
}  # name -> method, and the keys that it changes; @ROW stands for the checkpoint of that row
COMMANDS = ("efficientqat", "lrqat")  # methods whose command has their name; others run as ptq
MODELS_HELP = f"{', '.join(NAMES)}, or folders (default: {' '.join(SOURCES)})"
STEPS = ("quantize", "text", "tasks", "time")
TASKS = ("arc_easy", "piqa", "winogrande", "boolq")


class Cell(NamedTuple):
    """A row of a model on a grid; the row ``float`` has the grid ``-``."""

    model: str
    row: str
    grid: str

    @property
    def name(self) -> str:
        """The name by which ``--only`` and the results call it."""
        return "/".join(self)


def begins(cell: Cell) -> bool:
    """Return whether windows of text begin with the BOS token; lm-eval's tasks do by themselves."""
    return cell.model in SOURCES and SOURCES[cell.model].bos


class Table:
    """The cells of a command line, and what is known of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the results that the work folder has."""
        self.args, self.rows = args, ROWS | dict(row.split("=", 1) for row in args.row)
        self.file: Path = args.work / "results.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            kept = json.loads(line)
            self.found[kept["cell"], kept["step"]] = kept
        self.calibration = {"source": args.source, "num_samples": args.samples, "seq_len": args.length}

    def cells(self) -> Iterator[Cell]:
        """Yield the cells that are asked for; those that others begin with come first."""
        for model in self.args.models:
            every = [Cell(model, FLOAT, "-"), *(Cell(model, row, grid) for grid in GRIDS for row in self.rows)]
            yield from (cell for cell in every if any(fnmatchcase(cell.name, only) for only in self.args.only))

    def folder(self, cell: Cell) -> Path:
        """Return the checkpoint of a cell; of the row ``float`` the model itself."""
        return model_folder(cell.model) if cell.row == FLOAT else self.args.work / cell.name

    def measure(self) -> None:
        """Take the steps that are asked for and missing, model by model and step by step."""
        for model in self.args.models:
            cells = [cell for cell in self.cells() if cell.model == model]
            for step in (step for step in STEPS if step in self.args.steps):
                missing = [cell for cell in cells if self._misses(cell, step)]
                if step == "text":
                    self.texts(model, missing)
                    continue
                for cell in missing:
                    self._keep(cell, step, getattr(self, step)(cell))

    def _misses(self, cell: Cell, step: str) -> bool:
        """Return whether a step of a cell is to be taken; says so where it cannot be."""
        if (cell.name, step) in self.found or (cell.row == FLOAT and step in ("quantize", "time")):
            return False
        if step in ("text", "tasks") and not self.folder(cell).exists():
            print(f"{cell.name}: not quantized yet, no {step}", file=sys.stderr)
            return False
        return True

    def _keep(self, cell: Cell, step: str, result: dict[str, Any]) -> None:
        """Write the result of a step."""
        kept = {"cell": cell.name, "step": step} | result
        self.found[cell.name, step] = kept
        with self.file.open("a") as lines:
            lines.write(json.dumps(kept) + "\n")
        print(json.dumps(kept), flush=True)

    def quantize(self, cell: Cell, folder: Path | None = None) -> dict[str, Any]:
        """Write the checkpoint of a cell; return what it took, and its size."""
        out = folder or self.folder(cell)
        method, *changes = self.rows[cell.row].split()
        for change in [part for part in changes if "=@" in part]:
            key, _, row = change.partition("=@")
            changes[changes.index(change)] = f"{key}={self.folder(Cell(cell.model, row, cell.grid))}"
        recipe = {
            "model": {"path": str(model_folder(cell.model))},
            "method": {"name": method},
            "quant": {"group_size": 64, **GRIDS[cell.grid]},
            "data": self.calibration | {"bos": begins(cell)},
            "output": {"path": str(out)},
        }
        file = self.args.work / "recipes" / f"{cell.name.replace('/', '-')}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(recipe, indent=1))
        given = [part for change in [*self.args.set, *changes] for part in ("--set", change)]
        report, took = qtool(method if method in COMMANDS else "ptq", str(file), *given)
        kept = {"bits": report["bits_per_weight"], "bytes": report["quantized_bytes"]}
        return kept | took | {"data": self.calibration}

    def time(self, cell: Cell) -> dict[str, Any]:
        """Quantize a cell again, and return what it took."""
        folder = self.args.work / "timed"
        try:
            return self.quantize(cell, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder.with_name("timed.partial"), ignore_errors=True)

    def texts(self, model: str, cells: list[Cell]) -> None:
        """Measure perplexity and divergence of ``cells`` of a model on windows of text."""
        if not cells:
            return
        folders = [str(self.folder(cell)) for cell in cells if cell.row != FLOAT]
        asked = {"floats": str(model_folder(model)), "folders": folders, "windows": self.args.windows}
        asked["bos"] = begins(cells[0])
        output, _ = measured([sys.executable, __file__, "--read", json.dumps(asked)])
        found = json.loads(output.splitlines()[-1])
        for cell in cells:
            scores = found[str(self.folder(cell))]
            self._keep(cell, "text", {"windows": self.args.windows, "scores": scores})

    def tasks(self, cell: Cell) -> dict[str, Any]:
        """Return the accuracy of each task on its first questions."""
        asked = {"folder": str(self.folder(cell)), "tasks": TASKS, "limit": self.args.limit}
        output, _ = measured([sys.executable, __file__, "--score", json.dumps(asked)])
        return {"limit": self.args.limit, "scores": json.loads(output.splitlines()[-1])}

    def printed(self) -> str:
        """Return all that is known as a table in Markdown."""
        lines = [
            "| model | grid | method | bits | MB | perplexity | KL | KL 99 % | KL 99.9 % | top-1 | " + " | ".join(TASKS)
        ]
        lines[0] += " | mean | s | CPU s | peak GB |"
        lines.append("|---|---|---|" + "---:|" * (lines[0].count("|") - 4))
        for cell in self.cells():
            lines.append(f"| {cell.model} | {cell.grid} | {cell.row} | {' | '.join(self._figures(cell))} |")
        return "\n".join(lines)

    def _figures(self, cell: Cell) -> list[str]:
        made, text, tasks, timed = (self.found.get((cell.name, step), {}) for step in STEPS)
        scores, answers = text.get("scores", {}), tasks.get("scores", {})
        taken, mark = (timed, "") if timed else (made, "~")
        mean = sum(answers.values()) / len(answers) if answers else None
        figures = [
            (made.get("bits"), ".2f"),
            (made["bytes"] / 1e6 if made else None, ".1f"),
            (scores.get("perplexity"), ".2f"),
            (scores.get("kl"), ".4f"),
            (scores.get("99th percentile"), ".3f"),
            (scores.get("99.9th percentile"), ".3f"),
            (scores.get("top-1 agreement"), ".3f"),
            *((answers.get(task), ".3f") for task in TASKS),
            (mean, ".3f"),
        ]
        times = [(taken.get("seconds"), ".0f"), (taken.get("cpu_seconds"), ".0f")]
        times.append((taken["peak_bytes"] / 1e9 if taken else None, ".2f"))
        return [
            *("" if value is None else f"{value:{form}}" for value, form in figures),
            *("" if value is None else f"{mark}{value:{form}}" for value, form in times),
        ]


def measured(command: list[str]) -> tuple[str, dict[str, float]]:
    """Run a command; return what it prints, and its wall seconds, CPU seconds and peak memory."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    output = child.stdout.read()
    cpu_seconds, peak_bytes = wait(child)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}\n{output}")
    return output, {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak_bytes,
    }


def qtool(*arguments: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the report that a command of qtool prints, and what the command took."""
    output, took = measured([sys.executable, "-m", "qtool", *arguments, "--json", "--quiet"])
    report: dict[str, Any] = json.loads(output)["report"]
    return report, took


def read(floats: str, folders: list[str], windows: int, bos: bool) -> dict[str, dict[str, float]]:
    """Return the scores of the float model and of each quantized one on windows of WikiText-2, by folder."""
    from qtool.config.sections import ModelConfig
    from qtool.data.windows import perplexity_windows
    from qtool.evaluation.perplexity import divergence_metrics, score_models
    from qtool.models.loading import load_model

    reference = load_model(ModelConfig(path=floats))
    models = [load_model(ModelConfig(path=folder), quantized=True).model for folder in folders]
    tokens = perplexity_windows("wikitext2", reference, 1024, windows, 0, bos)
    if not models:
        (alone,) = score_models([reference.model], None, tokens, 1, False, "reading")
        return {floats: {"perplexity": alone.nll.mean().exp().item()}}
    rows = {}
    scores = score_models(models, reference.model, tokens, 1, True, "reading")
    for folder, found in zip(folders, scores, strict=True):
        rows[folder] = {"perplexity": found.nll.mean().exp().item()}
        rows[folder] |= {name: metric.value for name, metric in divergence_metrics(found).items()}
    assert scores[0].reference_nll is not None
    return rows | {floats: {"perplexity": scores[0].reference_nll.mean().exp().item()}}


def score(folder: str, tasks: list[str], limit: int) -> dict[str, float | None]:
    """Return the accuracy of a model on each task: of lm-eval's ``acc`` where a task has several metrics."""
    from qtool.config.sections import EvalConfig, ModelConfig
    from qtool.evaluation.tasks import evaluate
    from qtool.models.loading import load_model

    loaded = load_model(ModelConfig(path=folder), quantized=True)
    rows = evaluate(loaded, EvalConfig(tasks=tuple(tasks), limit=limit), None, 0)
    return {row.task: row.value for row in rows if row.metric == "acc"}


def main() -> None:
    """Measure the missing steps of the cells that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/real-table"))
    parser.add_argument("--models", "--model", nargs="+", default=[*SOURCES], help=MODELS_HELP)
    parser.add_argument("--row", action="append", default=[], metavar="NAME=METHOD KEY=VALUE ...", help="another row")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change every recipe")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of model/row/grid; default: all")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS[:3], help="default: all but time")
    parser.add_argument("--source", default="enwiki", help="calibration text")
    parser.add_argument("--samples", type=int, default=128, help="windows of it")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=40, help="windows of 1024 tokens of WikiText-2 to measure on")
    parser.add_argument("--limit", type=int, default=300, help="questions of each task")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    parser.add_argument("--score", help=argparse.SUPPRESS)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.score:
        print(json.dumps(score(**json.loads(args.score))))
        return
    if args.read:
        print(json.dumps(read(**json.loads(args.read))))
        return
    table = Table(args)
    try:
        if not args.print:
            table.measure()
    except NotThere as error:
        raise SystemExit(f"error: {error}") from None
    print(table.printed())


if __name__ == "__main__":
    main()
