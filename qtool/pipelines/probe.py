"""What a run will take: a few runs of the same recipe on one and two blocks, few windows and few steps, extrapolated.

A run's time is taken as ``c + d n + (B - 1) (a + b n) + s (e + f B)``, with ``B`` blocks, ``n`` windows of text and
``s`` steps of training; blocks count by the weights of their linears. Peak memory grows with the windows until their
hidden states exceed ``data.memory_budget``, and in a training of the whole model with its blocks. Each probe is a
process of its own, so that its peak is its own, and reads random tokens in place of the text; the text is timed by
itself.

``python -m qtool.pipelines.probe`` reads a recipe as JSON from standard input, and writes ``Cost`` into the file that
its argument names.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qtool.config.recipe import Recipe, resolved
from qtool.config.sections import MethodConfig, OutputConfig, TrackerConfig
from qtool.config.training import EndToEndConfig
from qtool.data import generated, windows
from qtool.models.described import described_model
from qtool.models.folders import resolve
from qtool.models.linears import linear_shapes
from qtool.models.loading import load_model
from qtool.pipelines import quantize
from qtool.pipelines.checks import needs_text
from qtool.pipelines.clock import PhaseTimer
from qtool.pipelines.lock import lock_of
from qtool.system import peaks, progress
from qtool.system.errors import InputError, QtoolError, RunError
from qtool.training.block_training import split_windows
from qtool.training.plan import plan_of

TOKENS = 4096  # of the smaller probes
WIDER = 4  # least factor between the windows of the smaller probes and of the larger one
SECONDS = 8.0  # about the time of the probe with more windows
STEPS = 2, 8  # steps of training of the smaller and the larger probe
ITERATIONS = 10, 30  # the same for a method that trains each block for a number of iterations
SHORTER = 8  # generated text is timed on windows shorter by this factor
VALIDATION_SHARE = 0.5  # of the time that a window takes in a step, in a forward of the model and its teacher


class Point(NamedTuple):
    """One probe."""

    blocks: int
    windows: int
    steps: int


class Measured(NamedTuple):
    """The seconds of each phase of a probe, and its peak memory."""

    seconds: Mapping[str, float]
    peak_bytes: int


def probe(recipe: Recipe) -> tuple[dict[str, float], int, float]:
    """Return the seconds of each phase of a run, its peak memory in bytes, and the seconds that the probe took.

    Raises:
        QtoolError: what the run itself would raise, such as missing text.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qtool-plan-") as folder:
        out = Path(folder) / "cost.json"
        command = [sys.executable, "-m", "qtool.pipelines.probe", str(out)]
        text = json.dumps(resolved(recipe))
        done = subprocess.run(command, input=text, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if not out.exists():
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise RunError(f"the probe of the run failed: {last[0]}; leave it out with --no-probe")
        found = json.loads(out.read_text(encoding="utf-8"))
    _raise(found)
    return found["seconds"], found["peak_bytes"], time.perf_counter() - start


def main(out: str) -> None:
    """Probe the recipe on standard input."""
    recipe = Recipe.model_validate(json.loads(sys.stdin.read()))
    try:
        with progress.use(progress.Sink()):
            seconds, peak = predict(recipe, Path(out).parent)
        found: dict[str, Any] = {"seconds": seconds, "peak_bytes": peak}
    except QtoolError as error:
        found = {"error": str(error), "exit_code": error.exit_code}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def predict(recipe: Recipe, folder: Path) -> tuple[dict[str, float], int]:
    """Return the seconds of each phase of a run, and its peak memory in bytes."""
    loaded = described_model(recipe.model)
    shapes = linear_shapes(loaded.blocks())
    sizes = _block_sizes(shapes, [name for name, _ in loaded.blocks()])
    count, text = recipe.data.num_samples, needs_text(recipe)
    small, large = _steps(recipe.method)
    # a step, a search or a check on fewer windows than these is shorter
    own = [getattr(recipe.method, key, 1) for key in ("search_samples", "check_samples", "validation_samples")]
    least = max(getattr(_training(recipe.method) or recipe.method, "batch_size", 1), *(each or 1 for each in own))
    first = min(count, max(1, TOKENS // recipe.data.seq_len, least)) if text else 1

    def run(blocks: int, num_windows: int, steps: int) -> Measured:
        return forked(lambda: measure(recipe, Point(blocks, num_windows, steps), [*shapes], folder), folder)

    data = forked(lambda: _data(recipe), folder) if text else None
    one = run(1, first, small)
    more = min(count, max(WIDER * first, int(first * SECONDS / max(0.01, one.seconds["quantize"]))))
    two = run(2, first, small) if len(sizes) > 1 else one
    wide = run(1, more, small) if text and more > first else one
    wider = run(2, more, small) if wide is not one and two is not one else two
    long = (run(1, first, large), run(2, first, large) if len(sizes) > 1 else one) if large > small else None
    seconds = {"load": one.seconds["load"]}
    if data is not None:
        seconds["data"] = data.seconds["data"]
    quantized = _time(one, two, wide, wider, sizes, (count - first) / (more - first) if more > first else 0.0)
    peak = float(one.peak_bytes)
    if wide is not one:
        slope = max(0, wide.peak_bytes - one.peak_bytes) / (more - first)
        peak += min(slope * (count - first), float(recipe.data.memory_budget) + wide.peak_bytes - one.peak_bytes)
    if long is not None:
        quantized += _trained(recipe, one, two, long, sizes, (small, large))
        peak = max(peak, *(each.peak_bytes for each in long))
        if _whole(recipe.method):
            grown = max(0, long[1].peak_bytes - long[0].peak_bytes) / max(1, sizes[1] if len(sizes) > 1 else 1)
            peak += grown * sum(sizes[2:])
    if data is not None:
        peak = max(peak, data.peak_bytes)
    return seconds | {"quantize": quantized, "save": one.seconds.get("save", 0.0)}, round(peak)


def _block_sizes(shapes: Mapping[str, tuple[int, int]], blocks: Sequence[str]) -> list[int]:
    """Return the number of weights in the linears of each block."""
    return [
        max(1, sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(f"{block}.")))
        for block in blocks
    ]


def _time(one: Measured, two: Measured, wide: Measured, wider: Measured, sizes: list[int], further: float) -> float:
    """Return the seconds of the phase ``quantize`` with all blocks and windows, and as few steps as ``one``.

    ``wide`` and ``wider`` are the probes of one and two blocks with more windows than ``one`` and ``two``, and
    ``further`` is how far the run is beyond ``one``, in units of what ``wide`` has more. The first block of a process
    takes longer than the others, because it is the first to touch the memory.
    """
    alone = [each.seconds["quantize"] for each in (one, wide)]
    second = [max(0.0, both.seconds["quantize"] - took) for both, took in zip((two, wider), alone, strict=True)]
    first, rest = (max(few, few + (many - few) * further) for few, many in (alone, second))
    return first + rest * sum(sizes[1:]) / (sizes[1] if len(sizes) > 1 else 1)


def _trained(
    recipe: Recipe,
    one: Measured,
    two: Measured,
    long: tuple[Measured, Measured],
    sizes: list[int],
    steps: tuple[int, int],
) -> float:
    """Return the seconds of the steps of training that the probes with few steps lack."""
    small, large = steps
    first = max(0.0, long[0].seconds["quantize"] - one.seconds["quantize"]) / (large - small)
    left = _all_steps(recipe) - small
    if not _whole(recipe.method):
        return left * first * sum(sizes) / sizes[0]
    second = max(0.0, long[1].seconds["quantize"] - two.seconds["quantize"]) / (large - small)
    each = max(0.0, second - first) / (sizes[1] if len(sizes) > 1 else 1)
    return left * (first + each * sum(sizes[1:]))


def _training(method: MethodConfig) -> EndToEndConfig | None:
    """Return the keys of the training of the whole model in a method's section, if it has one."""
    if isinstance(method, EndToEndConfig):
        return method
    found: Any = getattr(method, "e2e", None)
    return found if isinstance(found, EndToEndConfig) and found.steps != 0 else None


def _whole(method: MethodConfig) -> bool:
    return _training(method) is not None


def _steps(method: MethodConfig) -> tuple[int, int]:
    """Return the steps of the two probes of a training; equal if the method has no steps that can be fewer."""
    if _whole(method):
        return STEPS
    asked = getattr(method, "iterations", None)
    if not isinstance(asked, int):
        return 0, 0
    return min(asked, ITERATIONS[0]), min(asked, ITERATIONS[1])


def _all_steps(recipe: Recipe) -> float:
    """Return the steps of the whole training; validation counts as the steps that take as long."""
    training = _training(recipe.method)
    if training is None:
        return float(getattr(recipe.method, "iterations", 0))
    plan = plan_of(training, recipe.data.num_samples)
    checks = 0 if not plan.num_held_out else 2 + plan.num_steps / plan.validate_every if plan.validate_every else 2
    return plan.num_steps + checks * plan.num_held_out * VALIDATION_SHARE / training.batch_size


def _passes(method: Any, num_windows: int) -> float:
    """Return the passes that the training of a block makes over ``num_windows`` windows, the minimum steps included."""
    trained, _ = split_windows(num_windows, method.validation_samples)
    return max(method.epochs, method.min_steps * method.batch_size / len(trained)) if method.epochs else 0.0


def _shorter(method: MethodConfig, steps: int, num_windows: int) -> MethodConfig:
    """Return a method's section with ``steps`` of training, and without what comes with long ones.

    The training of a block keeps the passes that it makes over ``num_windows`` windows, those of the whole run.
    """
    few: dict[str, object] = {"steps": steps, "min_steps": 0, "save_every": 0}
    few |= {"validation_samples": 0, "validate_every": None}
    if isinstance(method, EndToEndConfig):
        return method.model_copy(update=few)
    changes: dict[str, Any] = {}
    if hasattr(method, "min_steps"):
        changes = {"min_steps": 0, "epochs": _passes(method, num_windows)}
    if (stage := getattr(method, "gsq", None)) is not None:
        changes["gsq"] = stage.model_copy(update={"min_steps": 0, "epochs": _passes(stage, num_windows)})
    if isinstance(found := getattr(method, "e2e", None), EndToEndConfig) and found.steps != 0:
        changes["e2e"] = found.model_copy(update=few)
    if hasattr(method, "iterations"):
        changes["iterations"] = steps
    return method.model_copy(update=changes)


def measure(recipe: Recipe, point: Point, names: Sequence[str], folder: Path) -> Measured:
    """Run a recipe on the first blocks of its model, on random tokens; ``names`` are those of all linears."""
    blocks, output = point.blocks, folder / f"{point.blocks}-{point.windows}-{point.steps}" / "out"
    output.parent.mkdir()
    loaded = described_model(recipe.model)
    kept = tuple(f"{name}." for name, _ in loaded.blocks()[:blocks])
    left = [name for name in names if name.startswith(kept)]
    given = recipe.quant.overrides.items()
    overrides = {pattern: each for pattern, each in given if any(fnmatchcase(name, pattern) for name in left)}
    changed = recipe.model_copy(
        update={
            "method": _shorter(recipe.method, point.steps, recipe.data.num_samples),
            "quant": recipe.quant.model_copy(update={"overrides": overrides}),
            "data": recipe.data.model_copy(update={"source": "generated", "num_samples": point.windows}),
            "eval": None,
            "export": (),
            "target": None,
            "tracker": TrackerConfig(),
            "output": OutputConfig(path=output),
        }
    )
    timer, source = PhaseTimer(), resolve(recipe.model.path)
    lock = lock_of(changed, source, model_files={})
    with quantize.open_run(changed, source, lock, True, timer) as run:
        size = (point.windows, recipe.data.seq_len)
        run.state.keep_tokens(torch.randint(loaded.num_embeddings, size, generator=torch.Generator().manual_seed(0)))
        run = replace(run, first_blocks=blocks)
        prepared = quantize.prepare(run)
        result = quantize.run_method(run, prepared)
        quantize.save(run, prepared, result)
    return Measured(timer.seconds, peaks.peak_memory_bytes())


def _data(recipe: Recipe) -> Measured:
    """Read the calibration text as the run will; text that the model writes itself is timed on shorter windows."""
    start = time.perf_counter()
    data = recipe.data
    loaded = load_model(recipe.model, streamed=data.source != "generated")
    if data.source != "generated":
        windows.calibration(data, loaded, recipe.seed)
        return Measured({"data": time.perf_counter() - start}, peaks.peak_memory_bytes())
    length = max(min(data.seq_len, 16), data.seq_len // SHORTER)
    batch = min(data.num_samples, generated.batch_size(loaded, data.seq_len))
    took = time.perf_counter() - start
    begun = time.perf_counter()
    generated.generated_tokens(loaded, batch, length, recipe.seed)
    written = (time.perf_counter() - begun) * data.seq_len / length * math.ceil(data.num_samples / batch)
    return Measured({"data": took + written}, peaks.peak_memory_bytes())


def forked(work: Any, folder: Path) -> Measured:
    """Return what ``work`` measures in a process of its own, where the system can fork.

    Raises:
        QtoolError: what ``work`` raised.
    """
    if not hasattr(os, "fork"):
        made: Measured = work()
        return made
    file = folder / "measured.json"
    file.unlink(missing_ok=True)
    libraries = peaks.status_bytes("RssFile") or 0
    pid = os.fork()
    if pid == 0:
        try:
            try:
                measured: Measured = work()
                # a fork begins without the pages of libraries, and touches only some of them again
                lost = max(0, libraries - (peaks.status_bytes("RssFile") or 0))
                found: dict[str, Any] = measured._replace(peak_bytes=measured.peak_bytes + lost)._asdict()
            except QtoolError as error:
                found = {"error": str(error), "exit_code": error.exit_code}
            file.write_text(json.dumps(found, default=dict), encoding="utf-8")
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    if not file.exists():
        raise RunError("a probe of the run ended without a result; leave it out with --no-probe")
    found = json.loads(file.read_text(encoding="utf-8"))
    _raise(found)
    return Measured(found["seconds"], found["peak_bytes"])


def _raise(found: Mapping[str, Any]) -> None:
    """Raise the error that a process wrote in place of its result."""
    if said := found.get("error"):
        raise {2: InputError}.get(found["exit_code"], RunError)(said)


if __name__ == "__main__":
    main(sys.argv[1])
