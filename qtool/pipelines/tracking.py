"""The experiment tracker of a run: TensorBoard, Weights & Biases or MLflow, as section ``tracker`` of its recipe says.

    config                           the recipe as flat keys: quant.num_bits
    blocks/<figure>                  of each finished block, by its index: block_error, weight_error, loss, ...
    training/<figure>, e2e-qp/...    of each step of a training of the whole model: loss, learning_rate, grad_norm, and
                                     validation_loss where there was a validation
    quality/<task>/<metric>          at the end; with _float the float model's, with _change the difference
    size/..., seconds/<phase>        at the end

A run that goes on after a kill goes on in the tracker, by the id in ``state/tracker.json``. A tracker that cannot be
opened is refused before any work; one that fails later is left out from then on, and a note says so: no hours of work
are lost to it, and no bit of the result depends on it. Each package is imported when a recipe asks for it.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from qtool.checkpoints.files import write_durably
from qtool.config.recipe import Recipe, resolved
from qtool.config.sections import TrackerConfig
from qtool.config.yaml_loader import dump
from qtool.pipelines.run_state import RunState
from qtool.reports.records import FileName
from qtool.reports.report import Report
from qtool.system import distributed, progress, reading
from qtool.system.errors import InputError, first_line
from qtool.system.printable import without_secrets

KEPT = "tracker.json"  # file of the run's id in the tracker
PROJECT = "qtool"
MOST_PARAMETERS = 100  # largest number of parameters in one request to MLflow
REMEDIES = {  # tracker -> what its user can do if it cannot be opened
    "tensorboard": "see that this folder can be written",
    "wandb": "log in with wandb login, or set WANDB_MODE=offline",
    "mlflow": "set MLFLOW_TRACKING_URI to a server that answers; mlflow-skinny has no store, mlflow has",
}
Ending = Literal["finished", "failed", "interrupted"]


class Tracker:
    """A place for the numbers of a run; this one drops them."""

    id = ""  # the name by which a later start of the run goes on
    where = ""  # how to see the run

    def log(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step of ``phase``."""

    def result(self, figures: Mapping[str, float]) -> None:
        """Take the figures of the finished run."""

    def close(self, ending: Ending) -> None:
        """Send what was not sent yet, and end."""


NO_TRACKER = Tracker()


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with; ``id`` is that of an earlier start of the run, if there was one."""

    config: TrackerConfig
    run_name: str
    logs: Path
    recipe: Mapping[str, Any]  # all keys, in sections
    id: str | None

    def project(self, variable: str) -> str:
        """Return the project; ``variable`` is the environment variable of the package for it."""
        return self.config.project or os.environ.get(variable) or PROJECT

    def flat(self) -> dict[str, str | int | float | bool]:
        """Return the recipe with dotted keys."""
        return dict(_flat(self.recipe))


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    if isinstance(value, Mapping) and value and all(str(name).isidentifier() for name in value):
        for name, each in value.items():
            yield from _flat(each, f"{key}.{name}" if key else str(name))
    else:  # patterns of overrides are no names of keys
        yield key, value if isinstance(value, str | int | float) else json.dumps(value)


class TensorBoard(Tracker):
    """Event files in a folder of their own in ``OUT.logs``."""

    def __init__(self, opening: Opening) -> None:
        """Begin the event file, with the recipe as text."""
        from torch.utils.tensorboard import SummaryWriter

        self.id = opening.id or f"{opening.run_name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:4]}"
        self.where = f"tensorboard --logdir {opening.logs}"
        self.flat = opening.flat()
        self.writer = SummaryWriter(opening.logs / self.id, flush_secs=10)
        if opening.id is None:
            self.writer.add_text("recipe", f"```yaml\n{dump(opening.recipe)}```")

    def log(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in figures.items():
            self.writer.add_scalar(f"{phase}/{name}", value, step)

    def result(self, figures: Mapping[str, float]) -> None:
        """Write the recipe and the figures as hyperparameters and their metrics, in the folder of this run."""
        self.writer.add_hparams(self.flat, dict(figures), run_name=".")

    def close(self, ending: Ending) -> None:
        """Flush and close the file."""
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases; steps are counted in each phase, so each has a step of its own."""

    def __init__(self, opening: Opening) -> None:
        """Start the run, or continue it."""
        import wandb

        opening.logs.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=opening.project("WANDB_PROJECT"),
            name=opening.run_name,
            id=opening.id,
            resume="allow" if opening.id else None,
            config=None if opening.id else opening.flat(),
            dir=os.environ.get("WANDB_DIR") or opening.logs,
            settings=wandb.Settings(console="off"),  # the lines of progress are no log
        )
        self.id = self.run.id
        self.where = f"wandb sync {Path(self.run.dir).parent}" if self.run.offline else self.run.url or ""
        self.phases: set[str] = set()

    def log(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures over the step of their phase."""
        if phase not in self.phases:
            self.run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            self.phases.add(phase)
        self.run.log({f"{phase}/step": step, **{f"{phase}/{name}": value for name, value in figures.items()}})

    def result(self, figures: Mapping[str, float]) -> None:
        """Put the figures into the summary, which tables of runs show."""
        self.run.summary.update(dict(figures))

    def close(self, ending: Ending) -> None:
        """End the run; W&B calls it failed if the code is not 0."""
        self.run.finish(exit_code={"finished": 0, "failed": 1, "interrupted": 130}[ending])


class MLflow(Tracker):
    """A run of MLflow, in the store that its own settings name."""

    def __init__(self, opening: Opening) -> None:
        """Create the run with the recipe as parameters, or continue it."""
        import mlflow

        project = opening.project("MLFLOW_EXPERIMENT_NAME")
        self.entities = mlflow.entities
        self.client = mlflow.MlflowClient()
        if opening.id is None:
            experiment = mlflow.set_experiment(project)  # makes it once, of several processes too
            self.id = self.client.create_run(experiment.experiment_id, run_name=opening.run_name).info.run_id
            params = [self.entities.Param(key, str(value)) for key, value in opening.flat().items()]
            for first in range(0, len(params), MOST_PARAMETERS):
                self.client.log_batch(self.id, params=params[first : first + MOST_PARAMETERS])
        else:
            self.id = opening.id
            self.client.update_run(self.id, status="RUNNING")
        self.where = f"mlflow ui --backend-store-uri {mlflow.get_tracking_uri()}, experiment {project}"

    def log(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures as metrics, in one request."""
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(f"{phase}/{name}", value, now, step) for name, value in figures.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def result(self, figures: Mapping[str, float]) -> None:
        """Log the figures as metrics without steps."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[self.entities.Metric(*each, now, 0) for each in figures.items()])

    def close(self, ending: Ending) -> None:
        """Set the state of the run."""
        status = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[ending]
        self.client.set_terminated(self.id, status)


TRACKERS: dict[str, Callable[[Opening], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


class Guarded(Tracker):
    """A tracker that is left out from its first fault on, which a note tells."""

    def __init__(self, name: str, inner: Tracker) -> None:
        """Send to ``inner``, the tracker called ``name``."""
        self.name, self.inner = name, inner

    def _tried(self, call: Callable[[Tracker], None]) -> None:
        try:
            call(self.inner)
        except Exception as error:  # whatever the package raises: it is outside software
            self.inner = NO_TRACKER
            progress.note(
                f"{_fault(self.name, error)}; the run goes on without it, and its result is the same. {self.name} has "
                "the numbers until here"
            )

    def log(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step of ``phase``."""
        self._tried(lambda inner: inner.log(phase, step, figures))

    def result(self, figures: Mapping[str, float]) -> None:
        """Take the figures of the finished run."""
        self._tried(lambda inner: inner.result(figures))

    def close(self, ending: Ending) -> None:
        """Send what was not sent yet, and end."""
        self._tried(lambda inner: inner.close(ending))


def _fault(name: str, error: Exception) -> str:
    return f"tracker {name} failed: {type(error).__name__}: {first_line(error).rstrip('.')}"


def installed(package: str) -> bool:
    """Return whether ``package`` can be imported."""
    return find_spec(package) is not None


def check(config: TrackerConfig) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        InputError: the message says what to install.
    """
    if config.name != "none" and not installed(config.name):
        raise InputError(
            f"tracker.name: {config.name} is not installed; pip install {config.name}, or leave the section tracker out"
        )


class _Kept(BaseModel):
    """The content of ``tracker.json``."""

    name: str
    id: FileName


@contextmanager
def opened(recipe: Recipe, state: RunState) -> Iterator[Tracker]:
    """Open the tracker of a run, or continue an earlier start in it; it is closed after the ``with`` block.

    Of several processes the first one has it.

    Raises:
        InputError: the tracker cannot be opened.
    """
    name = recipe.tracker.name
    if name == "none" or not distributed.is_first():
        yield NO_TRACKER
        return
    inner = _open(recipe, state)
    progress.note(f"tracker {name}: {inner.where}")
    tracker = Guarded(name, inner)
    ending: Ending = "failed"
    try:
        yield tracker
        ending = "finished"
    except KeyboardInterrupt:
        ending = "interrupted"
        raise
    finally:
        tracker.close(ending)


def _open(recipe: Recipe, state: RunState) -> Tracker:
    name, output, file = recipe.tracker.name, recipe.output.path, state.folder / KEPT
    logs = output.with_name(f"{output.name}.logs")
    try:
        kept = _Kept.model_validate(reading.read_object(file))
    except (FileNotFoundError, InputError, ValidationError):
        kept = None
    before = kept.id if kept is not None and kept.name == name else None
    sections = without_secrets(resolved(recipe))
    try:
        tracker = TRACKERS[name](
            Opening(recipe.tracker, recipe.tracker.run_name or output.name, logs, sections, before)
        )
    except Exception as error:  # whatever the package raises: it is outside software
        place = f" in {logs}" if name == "tensorboard" else ""
        raise InputError(f"{_fault(name, error)}{place}; {REMEDIES[name]}, or leave the section tracker out") from error
    write_durably(file, _Kept(name=name, id=tracker.id).model_dump())
    return tracker


def result_figures(report: Report) -> dict[str, float]:
    """Return the numbers of a finished run for a tracker: quality, sizes and seconds, by name."""
    figures: dict[str, float] = {}
    for row in report.shown():
        for value, suffix in ((row.value, ""), (row.float_value, "_float"), (row.delta, "_change")):
            if value is not None:
                figures[f"quality/{row.task}/{row.metric}{suffix}".replace(" ", "_")] = value
    for name in ("bits_per_weight", "file_bits_per_weight", "quantized_bytes", "float_bytes"):
        if (size := getattr(report, name)) is not None:
            figures[f"size/{name}"] = size
    return figures | {f"seconds/{phase.replace(' ', '_')}": taken for phase, taken in report.seconds.items()}
