"""Check the decoder families of transformers, and write the table of ``docs/recipes/architectures.md``.

    python scripts/architectures.py RESULTS            # each model in a process of its own
    python scripts/architectures.py RESULTS --only llama,mixtral

``RESULTS`` is a folder for one JSON file a model. A later start goes on where the last one stopped, and checks again
what was wrong or crashed. The table is written once all models are there.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
import transformers

from qtool.reports import figures

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import architecture_checks, architectures
from helpers.architecture_checks import EXPORTS, REQUIRED, STEPS

PROCESSES = multiprocessing.get_context("forkserver")  # libraries are imported once, and each model has a process
DOCS = Path(__file__).parents[1] / "docs" / "recipes" / "architectures.md"
PACKAGES = ("transformers", "torch", "compressed-tensors", "gguf")
TIMEOUT = 900  # seconds for one model
SHORT = {"states": "states", "generated": "text", "efficientqat": "eqat", "export compressed-tensors": "ct"}
TITLES = {
    "dense": "Dense transformers",
    "hybrid": "Recurrent and hybrid",
    "mixtures": "Mixtures of experts",
    "multimodal": "Multimodal (the text decoder is quantized)",
}
Outcomes = dict[str, str]  # step -> ``ok`` or a line


def main() -> int:
    """Check what has no result yet, write the table, print the counts; return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", help="names of architectures, separated by commas")
    parser.add_argument("-j", "--jobs", type=int, default=1)
    asked = parser.parse_args()
    asked.results.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(each for each in sys.path if each)  # the server of processes reads it from here
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", PYTHONPATH=path)
    PROCESSES.set_forkserver_preload([architecture_checks.__name__, "qtool.pipelines.api"])
    names = asked.only.split(",") if asked.only else list(architectures.architectures())
    done = [name for name in names if _file(asked.results, name).exists()]
    good = [name for name in done if verdict(_read(asked.results, name)) in ("right", "refused")]
    left = [name for name in names if name not in good]
    with ThreadPoolExecutor(asked.jobs) as pool:
        for name, outcomes in zip(left, pool.map(lambda name: _checked(name, asked.results), left), strict=True):
            print(f"{name}: {verdict(outcomes)}", flush=True)
    found = {name: _read(asked.results, name) for name in names}
    print(*(f"{count} {word}" for word, count in counts(found.values()).items()), sep=", ")
    if asked.only is None:
        DOCS.write_text(page(found), encoding="utf-8")
    return int(any(verdict(outcomes) in ("wrong", "crash") for outcomes in found.values()))


def _file(results: Path, name: str) -> Path:
    return results / f"{name}.json"


def _read(results: Path, name: str) -> Outcomes:
    outcomes: Outcomes = json.loads(_file(results, name).read_text(encoding="utf-8"))
    return outcomes


def _checked(name: str, results: Path) -> Outcomes:
    """Return the outcomes of one model, checked in a process of its own; one that dies is a crash in every step."""
    process = PROCESSES.Process(target=_check_here, args=(name, results))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
    if not _file(results, name).exists():
        fault = f"crash: the process ended with {process.exitcode}, after {TIMEOUT} s at most"
        _write(results, name, dict.fromkeys(STEPS, fault))
    return _read(results, name)


def _check_here(name: str, results: Path) -> None:
    """Check one model and write its file."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # a figure says nothing about an architecture
    with mock.patch.object(figures, "DRAWERS", ()), tempfile.TemporaryDirectory() as folder:
        _write(results, name, architecture_checks.check(name, Path(folder)))


def _write(results: Path, name: str, outcomes: Outcomes) -> None:
    partial = results / f"{name}.partial"
    partial.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    partial.rename(_file(results, name))


# the page


def verdict(outcomes: Outcomes) -> str:
    """Return what a model is: ``crash``, ``wrong`` or ``refused`` if any required step is, or ``right``.

    A crash or a wrong result of an export counts too; an export that is refused does not.
    """
    kinds = {outcome.partition(":")[0] for outcome in outcomes.values()}
    required = {outcomes[step].partition(":")[0] for step in REQUIRED}
    if found := [kind for kind in ("crash", "wrong") if kind in kinds]:
        return found[0]
    return "right" if required == {"ok"} else "refused"


def counts(every: Iterable[Outcomes]) -> dict[str, int]:
    """Return how many models are right, refused, silently wrong and crashed."""
    found = Counter(verdict(outcomes) for outcomes in every)
    return {word: found[word] for word in ("right", "refused", "wrong", "crash")}


def page(found: dict[str, Outcomes]) -> str:
    """Return the content of ``docs/recipes/architectures.md``."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    total = counts(found.values())
    lines = [
        "# Architectures",
        "",
        "Written by `python scripts/architectures.py RESULTS`; do not edit.",
        "",
        f"{date.today().isoformat()}, {versions}, CPU. {len(found)} tiny random models (`tests/architectures/*.yaml`), "
        "one for each decoder family of transformers and its variants:",
        "",
        f"**{total['right']} right in every step, {total['refused']} refused in a step, {total['wrong']} silently "
        f"wrong, {total['crash']} crashed.**",
        "",
        *LEGEND,
    ]
    for kind, title in TITLES.items():
        rows = {name: found[name] for name, row in architectures.architectures().items() if row.kind == kind}
        own = counts(rows.values())
        words = ", ".join(f"{count} {word}" for word, count in own.items() if count)
        lines += ["", f"## {title}", "", f"{len(rows)} models: {words}.", "", *_table(rows)]
    return "\n".join([*lines, *_reasons(found)]) + "\n"


LEGEND = (
    "* `states`: the hidden states that calibration carries from block to block, four batches of different text, equal "
    "those of the model's own forward to the last bit.",
    "* `text`: what the model writes for `data.source: generated` is what it writes without a cache, token by token.",
    "* A method is `ok` where its command ends well, the native folder and the dense export give the same logits to "
    "the last bit (float32), and nothing in the blocks stays float without a note but small parameters (5 %). For "
    "`rtn` also: the dense export has the published names, its float tensors equal the model's, the others are near.",
    "* An export is `ok` where the exporter read back what it wrote; `-`: there was no checkpoint to export.",
    "* The column `→ gguf` is of that day; [Models in GGUF](../deploy/gguf-models.md) lists the families that GGUF is "
    "written for.",
    "* `ref`: refused with the reason, which is below. A refused export does not count against a model.",
)


def _table(rows: dict[str, Outcomes]) -> list[str]:
    heads = [SHORT.get(step, step.removeprefix("export ")) for step in STEPS]
    heads = [f"→ {head}" if step in EXPORTS else head for step, head in zip(STEPS, heads, strict=True)]
    lines = ["| model | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, outcomes in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(outcomes[step]) for step in STEPS) + " |")
    return lines


def _cell(outcome: str) -> str:
    kind = outcome.partition(":")[0]
    if outcome.endswith("there is no checkpoint to export"):
        return "-"
    return {"ok": "ok", "refused": "ref", "wrong": "**WRONG**", "crash": "**CRASH**"}[kind]


def _reasons(found: dict[str, Outcomes]) -> list[str]:
    """Return every reason once, with the models and steps that have it; reasons differ in more than numbers."""
    places: dict[str, dict[str, list[str]]] = {}
    first: dict[str, str] = {}
    for name, outcomes in found.items():
        for step, outcome in outcomes.items():
            if outcome != "ok" and _cell(outcome) != "-":
                line = re.sub(r"^(refused: )FOLDER/rtn cannot be exported as [\w-]+: ", r"\1", outcome)
                line = re.sub(r"model_type is \S+,", "model_type is another,", line)
                key = re.sub(r"\d+", "0", line)
                first.setdefault(key, line)
                places.setdefault(key, {}).setdefault(name, []).append(step)
    lines = ["", "## Reasons", ""]
    for key, models in sorted(places.items(), key=lambda item: (item[0].split(":")[0], -len(item[1]))):
        lines.append(f"* {first[key]}")
        by_steps: dict[str, list[str]] = {}
        for name, steps in models.items():
            by_steps.setdefault(_named(steps), []).append(name)
        lines += [f"  * {steps}: {', '.join(names)}" for steps, names in by_steps.items()]
    return lines if places else []


def _named(steps: list[str]) -> str:
    return "every step" if set(REQUIRED) <= set(steps) else ", ".join(steps)


if __name__ == "__main__":
    sys.exit(main())
