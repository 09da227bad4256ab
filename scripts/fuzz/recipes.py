"""Recipes and sweeps with random faults, each loaded and checked as a run does before its work begins.

    python scripts/fuzz/recipes.py --seed 0 --count 20000

Every packaged recipe and sweep, a recipe of every method with all its keys, and a few written by hand are changed, as
text and as data. Exit code 1 if any input ends in a traceback or takes too long.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import values
import workers

HAND = """\
model: &model {path: builtin:wiki-llama-3m, dtype: float32, device: cpu}
method: {name: gptq, damp: 0.02}
quant:
  num_bits: 4
  group_size: 64
  overrides:
    "*.0.mlp.down_proj": &wide {num_bits: 8, symmetric: false}
    "*.1.mlp.down_proj": {<<: *wide, symmetric: true}
    "*.1.self_attn.*": {<<: [*wide, {skip: true}]}
data: {source: text.txt, num_samples: 4, seq_len: 64, memory_budget: 1GB}
eval: {tasks: [generated], limit: 1, context: 8, batch_size: auto}
export: [{format: dense, path: e1}, {format: compressed-tensors, path: $HOME/e2, dtype: float16}]
expected: [{tasks: [generated], metric: perplexity, value: 5.47, source: a paper}]
output: {path: ~/out, overwrite: true, plots: true}
seed: 1
"""
BUDGET = """\
model: {path: builtin:wiki-llama-3m}
method: {name: rtn}
quant: {group_size: 64, budget: {average_bits: 3.5, estimator: variance, floors: {"*v_proj": 4}, pins: {"*o_proj": 8}}}
output: {path: out}
"""
SWEEP = """\
# A sweep by hand
recipe: {model: {path: builtin:wiki-llama-3m}, method: {name: rtn}, data: {source: text.txt, num_samples: 2}}
set: {quant.group_size: 64}
grid:
  seed: [1, 2]
  quant.num_bits: {four: 4, three: 3}
  size: {small: {data.seq_len: 16}, large: {data.seq_len: 32, method: {name: gptq}}}
exclude: [{seed: 1, size: small}]
cells: {extra: {quant.num_bits: 8, columns: {size: other}}}
over: [seed]
launcher: {name: local}
bench: {repeats: 1}
"""
CORNERS = ("seed=1", "quant.num_bits=3", "export=[]", "quant.overrides.*x=skip", "data.source=~", "x", "=", "a.b.c.d=1")


def corpus() -> list[list[tuple[str, str]]]:
    """Return groups of inputs to change, each input a kind (recipe or sweep) and its text."""
    from qtool.config import catalog, files
    from qtool.config.recipe import Recipe, resolved

    packaged, runnable, complete = [], [], []
    for path in files.packaged().values():
        packaged.append(("recipe", path.read_text(encoding="utf-8")))
        sections = files.read_yaml(path)
        sections["model"]["path"] = "builtin:wiki-llama-3m"
        sections["method"].pop("init_from", None)
        sections |= {"data": {"source": "generated", "num_samples": 8, "seq_len": 64}, "eval": {"tasks": ["generated"]}}
        runnable.append(("recipe", json.dumps(sections | {"expected": []}, indent=1)))
    for name in catalog.methods():
        sections = {"model": {"path": "builtin:wiki-llama-3m"}, "method": {"name": name}, "output": {"path": "out"}}
        complete.append(("recipe", json.dumps(resolved(Recipe.model_validate(sections)), indent=1)))
    tables = [("sweep", path.read_text(encoding="utf-8")) for path in files.tables().values()]
    return [packaged, runnable, complete, tables, [("recipe", HAND), ("recipe", BUDGET), ("sweep", SWEEP)]]


def mutated(kind: str, text: str, random: Random) -> tuple[bytes, list[str]]:
    """Return the bytes of a changed recipe, and overrides for ``--set``."""
    from qtool.config.yaml_loader import parse

    for _ in range(random.choice((1, 1, 1, 2, 4))):
        try:
            data: Any = parse(text) if random.random() < 0.6 else None
        except ValueError:
            data = None
        if data is None:
            text = values.changed_text(text, random)
        else:
            text = json.dumps(values.changed(data, random), ensure_ascii=random.random() < 0.8)
    content = text.encode("utf-8", "surrogatepass")
    if random.random() < 0.02:
        content = text.encode("utf-16", "surrogatepass")
    overrides = []
    if random.random() < 0.2:
        key = random.choice(
            ("seed", "model.path", "data.source", "output.path", "quant.num_bits", "eval", "grid", "x.y")
        )
        value = json.dumps(random.choice(values.VALUES))
        overrides.append(random.choice((*CORNERS, f"{key}={value}")))
    return content, overrides


def check_recipe(file: Path, overrides: list[str]) -> None:
    """Do with a recipe what a run does before it reads text and quantizes."""
    from qtool.allocation.plan import mixed, units_of
    from qtool.checkpoints.native import PlannedCheckpoint
    from qtool.config import recipe as recipes
    from qtool.data.generated import check_length
    from qtool.models.folders import resolve
    from qtool.models.loading import choose_device
    from qtool.models.targets import select_targets
    from qtool.pipelines.checks import check_early, check_exports
    from qtool.pipelines.lock import lock_of

    recipe = recipes.load(file, overrides)
    check_early(recipe)
    folder = resolve(recipe.model.path, fetch=False)
    choose_device(recipe.model.device)
    lock_of(recipe, folder, {})
    loaded = model(recipe.model.path)
    units = None if recipe.quant.budget is None else units_of(loaded, recipe.quant)
    targets = select_targets(loaded, recipe.quant) if units is None else [t for unit in units for t in unit.targets]
    specs = {target.name: target.spec for target in targets} if units is None else mixed(units)
    check_exports(recipe, PlannedCheckpoint(loaded, specs, {target.name: target.weight_shape for target in targets}))
    check_length("data.seq_len", recipe.data.seq_len, loaded)


@cache
def model(path: str) -> Any:
    """Return the model at ``path``, loaded once."""
    from qtool.config.sections import ModelConfig
    from qtool.models.loading import load_model

    return load_model(ModelConfig(path=path, device="cpu"))


def check_sweep(file: Path, overrides: list[str]) -> None:
    """Do with a sweep what ``qtool sweep`` does before it runs a cell, for the first cells."""
    from qtool.pipelines.checks import check_early
    from qtool.sweeps import grid

    checked = grid.load(file, overrides, Path("sweep"))
    checked.config.launcher.check()
    for cell in checked.cells[:3]:
        check_early(cell.recipe)


def prepare(seed: int) -> Any:
    """Return the function that a worker calls once, which returns the function that runs one input."""

    def ready(folder: Path) -> workers.Try:
        from qtool.system.errors import QtoolError

        (folder / "text.txt").write_text("word " * 1000)
        (folder / "loop").symlink_to("loop")
        groups = corpus()
        model("builtin:wiki-llama-3m")
        for kind, text in (
            each for group in groups for each in group[:20]
        ):  # so that imports are not counted as an input's time
            run(kind, text.encode(), [], QtoolError)

        def attempt(index: int) -> Callable[[], str]:
            random = Random(f"{seed} {index}")
            kind, text = random.choice(random.choice(groups))
            content, overrides = mutated(kind, text, random)
            return lambda: run(kind, content, overrides, QtoolError)

        return attempt

    return ready


def run(kind: str, content: bytes, overrides: list[str], refused: type[Exception]) -> str:
    """Write and check one input; return how it ended."""
    file = Path("input.yaml")
    file.write_bytes(content)
    try:
        (check_recipe if kind == "recipe" else check_sweep)(file, overrides)
    except refused:
        return workers.REFUSED
    return workers.RIGHT


def main() -> int:
    """Run the inputs that the command line asks for; return the exit code."""
    asked = workers.arguments(20_000, str(__doc__).partition("\n")[0])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    counts = workers.run(prepare(asked.seed), range(asked.start, asked.start + asked.count), asked.jobs)
    return int(any(counts[how] for how in workers.FAULTS))


if __name__ == "__main__":
    sys.exit(main())
