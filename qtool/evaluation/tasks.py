"""The tasks of an evaluation: perplexity per token, KL divergence from the float model, and the tasks of lm-eval.

``wikitext2``, ``c4``, ``generated`` and ``kl`` are measured here, on windows of text; any other name is a task of
lm-eval (``harness.py``). The quantized and the float model are measured by the same code on the same windows, in one
pass.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import Tensor

from qtool.config.sections import AGREEMENT, METRICS, EvalConfig
from qtool.data.drawn_windows import C4
from qtool.data.hub import UnreachableError
from qtool.data.sources import GENERATED
from qtool.data.vocabulary import check_ids
from qtool.data.windows import perplexity_windows, token_hash
from qtool.evaluation.contamination import CalibrationSeen, overlap, relation
from qtool.evaluation.paired import change_error
from qtool.evaluation.perplexity import (
    WindowScores,
    change_stderr,
    divergence_metrics,
    perplexity_metric,
    score_windows,
)
from qtool.models import backend
from qtool.models.auto_class import is_multimodal
from qtool.models.loaded import LoadedModel
from qtool.reports.records import TaskResult, task_result
from qtool.system.distribution import install
from qtool.system.errors import InputError, nearest

if TYPE_CHECKING:
    from qtool.evaluation.harness import Score

WIKITEXT = "wikitext2"
DIVERGENCE = "kl"
OWN_TASKS = tuple(METRICS)  # tasks that are measured here


def check_tasks(config: EvalConfig) -> None:
    """Check that every task can be measured, before any long work; downloads the data of lm-eval's tasks.

    Raises:
        InputError: a task is unknown or repeated, its data, lm-eval or what ``backend`` needs is not there, or
            ``num_fewshot`` names a task that is not in ``tasks``.
    """
    backend.check(config.backend)
    repeated = {task for task in config.tasks if config.tasks.count(task) > 1}
    if repeated:
        raise InputError(f"eval.tasks: {', '.join(sorted(repeated))} is named more than once")
    if isinstance(config.num_fewshot, dict):
        for task in config.num_fewshot:
            if task not in config.tasks or task in OWN_TASKS:
                hint = nearest(task, config.tasks, "; did you mean {}?")
                raise InputError(f"eval.num_fewshot: {task!r} is not one of eval.tasks that take examples{hint}")
    theirs = [task for task in config.tasks if task not in OWN_TASKS]
    if theirs:
        if find_spec("lm_eval") is None:
            raise InputError(_without_lm_eval(theirs))
        from qtool.evaluation import harness

        harness.check(theirs, config.num_fewshot)


def _without_lm_eval(tasks: Sequence[str]) -> str:
    hints = [nearest(task, OWN_TASKS, f"; instead of {task}, did you mean {{}}?") for task in tasks]
    return (
        f"eval.tasks: {', '.join(tasks)}: only {', '.join(OWN_TASKS)} are measured without lm-eval, which is not "
        f"installed; install it with: {install('tasks')}, or name only these{''.join(hints)}"
    )


def check_model(config: EvalConfig, loaded: LoadedModel) -> None:
    """Refuse tasks about pictures for a model that reads text only.

    Raises:
        InputError: there is such a task.
    """
    theirs = [task for task in config.tasks if task not in OWN_TASKS]
    if not theirs or is_multimodal(loaded.model.config):
        return
    from qtool.evaluation import harness

    wrong = next((task for task in theirs if harness.reads_pictures(task)), None)
    if wrong is not None:
        raise InputError(
            f"eval.tasks: {wrong} asks about pictures, and {loaded.path} reads text only; take the task out, or use a "
            "multimodal model"
        )


def check_reference(config: EvalConfig, path: str, why: str | None) -> None:
    """Refuse ``kl`` where there is no float model; ``why``: what is known of its absence, ``None``: there is one.

    Tasks that are unset have ``kl`` only beside a float model.

    Raises:
        InputError: it is asked for, and there is no float model.
    """
    if why is not None and DIVERGENCE in config.tasks and "tasks" in config.model_fields_set:
        raise InputError(
            f"eval.tasks: {DIVERGENCE} compares {path} with the float model it was made from, and {why}; name it with "
            f"--float-model (from Python: reference), or leave {DIVERGENCE} out"
        )


def evaluate(
    loaded: LoadedModel,
    config: EvalConfig,
    reference: LoadedModel | None,
    seed: int,
    seen: CalibrationSeen | None = None,
    done: Mapping[str, Sequence[TaskResult]] | None = None,
    keep: Callable[[str, Sequence[TaskResult]], None] | None = None,
) -> list[TaskResult]:
    """Measure ``config.tasks`` for ``loaded`` and, beside it, for its float model ``reference``.

    ``done`` are the rows of tasks that an earlier start of the same evaluation measured, which are not measured again;
    ``keep`` is called with each task and its rows as they become known.

    ``kl`` is measured on windows of WikiText-2, or of generated text if WikiText-2 is not available. The row of a task
    that cannot be measured because WikiText-2 or C4 is not available says so. Rows on windows of text also have the
    share of the windows that occurs in the calibration text ``seen``.

    Raises:
        InputError: a task of lm-eval is unknown, has no data, or asks a model about pictures that reads text only;
            or ``kl`` is asked for without a reference.
    """
    check_model(config, loaded)
    check_reference(config, loaded.path, "none was given" if reference is None else None)
    if reference is None:
        config = config.model_copy(update={"tasks": tuple(task for task in config.tasks if task != DIVERGENCE)})
    rows = {task: list(found) for task, found in (done or {}).items()}
    with backend.using(loaded.model, config.backend):
        if any(task in OWN_TASKS and task not in rows for task in config.tasks):
            rows |= _own_tasks(loaded, config, reference, seed, seen)
        for task in config.tasks:
            if task not in rows:
                rows[task] = _lm_eval_task(task, loaded, config, reference)
            if keep is not None and task not in (done or {}):
                keep(task, rows[task])
    found = [row for task in config.tasks for row in rows[task]]
    return [row if seen is None else _with_relation(row, seen.source) for row in found]


def _with_relation(row: TaskResult, source: str) -> TaskResult:
    """Return ``row``; if its text is related to the calibration text ``source``, a note says how."""
    known = relation(source, row.task) if row.value is not None else ""
    return row.model_copy(update={"note": "; ".join(filter(None, (row.note, known)))})


def _own_tasks(
    loaded: LoadedModel,
    config: EvalConfig,
    reference: LoadedModel | None,
    seed: int,
    seen: CalibrationSeen | None = None,
) -> dict[str, list[TaskResult]]:
    """Return rows by task. Both models read each set of windows once, although two tasks may use it."""
    wanted = [task for task in config.tasks if task in OWN_TASKS]
    rows: dict[str, list[TaskResult]] = {}
    windows: dict[str, Tensor] = {}
    for name in (WIKITEXT, C4):
        if name in wanted or (name == WIKITEXT and DIVERGENCE in wanted):
            try:
                windows[name] = perplexity_windows(name, loaded, config.context, config.limit, seed, config.bos)
            except UnreachableError as error:
                reason = f"not measured: {error}"
                rows[name] = [TaskResult(task=name, metric="perplexity", value=None, limit=config.limit, note=reason)]
    kl_on = (WIKITEXT if WIKITEXT in windows else GENERATED) if DIVERGENCE in wanted else None
    if GENERATED in wanted or kl_on == GENERATED:
        writer = reference or loaded
        windows[GENERATED] = perplexity_windows(GENERATED, writer, config.context, config.limit, seed)
    for each in filter(None, (loaded, reference)):
        for name, tokens in windows.items():
            check_ids(tokens, each, f"the text of {name}")
    if reference is not None and kl_on is not None:
        _check_same_vocabulary(loaded, reference)
    for name in [name for name in windows if name in wanted or name == kl_on]:
        scores = score_windows(
            loaded.model,
            reference.model if reference else None,
            windows[name],
            config.batch_size,
            name == kl_on,
            f"reading {name}",
        )
        rows[name] = [_perplexity_row(name, scores, windows[name], config, reference is not None)]
        if name == kl_on:
            rows[DIVERGENCE] = _divergence_rows(name, scores, windows[name], config)
        if seen is not None and seen.tokens is not None:
            share = overlap(seen.tokens, windows[name])
            for task in {name, DIVERGENCE} if name == kl_on else {name}:
                rows[task] = [row.model_copy(update={"overlap": share}) for row in rows[task]]
    return rows


def _check_same_vocabulary(loaded: LoadedModel, reference: LoadedModel) -> None:
    """Refuse to compare predictions of models with embedding tables of different sizes."""
    if loaded.num_embeddings != reference.num_embeddings:
        raise InputError(
            f"kl: {loaded.path} has {loaded.num_embeddings} tokens, and its float model {reference.path} has "
            f"{reference.num_embeddings}; compare with the float model that it was made from, or leave kl out"
        )


def _perplexity_row(
    name: str, scores: WindowScores, windows: Tensor, config: EvalConfig, has_reference: bool
) -> TaskResult:
    note = f"{windows.shape[0]} windows of {windows.shape[1]} tokens"
    if name == GENERATED:
        note += " that the float model wrote" if has_reference else " that this model wrote itself"
    elif config.bos:
        note += ", the first of them BOS"
    other = None if scores.reference_nll is None else perplexity_metric(scores.reference_nll, windows)
    change = None if scores.reference_nll is None else change_stderr(scores.nll, scores.reference_nll)
    return task_result(
        name,
        "perplexity",
        perplexity_metric(scores.nll, windows),
        other,
        delta_stderr=change,
        higher_is_better=False,
        limit=config.limit,
        note=note,
        windows=scores.nll.tolist(),
        text=token_hash(windows),
    )


def _divergence_rows(name: str, scores: WindowScores, windows: Tensor, config: EvalConfig) -> list[TaskResult]:
    assert scores.kl is not None
    assert scores.agreement is not None
    note = f"against the float model on {windows.shape[0]} windows of {windows.shape[1]} tokens of {name}"
    by_window = {"kl": scores.kl, AGREEMENT: scores.agreement}
    return [
        task_result(
            DIVERGENCE,
            metric,
            measured,
            None,
            higher_is_better=metric == AGREEMENT,
            limit=config.limit,
            note=note,
            windows=by_window[metric].tolist() if metric in by_window else (),
            text=token_hash(windows),
        )
        for metric, measured in divergence_metrics(scores).items()
    ]


def _lm_eval_task(
    task: str, loaded: LoadedModel, config: EvalConfig, reference: LoadedModel | None
) -> list[TaskResult]:
    from qtool.evaluation import harness

    shots = config.num_fewshot if isinstance(config.num_fewshot, int) else config.num_fewshot.get(task)
    scores = harness.run(loaded, task, shots, config.limit, config.batch_size, task)
    floats = []
    if reference is not None:
        floats = harness.run(reference, task, shots, config.limit, config.batch_size, f"{task}, float model")
    other = {(score.task, score.metric): score for score in floats}
    return [_lm_eval_row(score, other.get((score.task, score.metric)), config.limit) for score in scores]


def _lm_eval_row(score: "Score", reference: "Score | None", limit: int | None) -> TaskResult:
    """Return the row of a metric of lm-eval and, beside it, of the same metric of the float model."""
    error = None
    if reference is not None:
        error = change_error(score.answers, reference.answers, score.measured.value, reference.measured.value)
    return task_result(
        score.task,
        score.metric,
        score.measured,
        None if reference is None else reference.measured,
        delta_stderr=error,
        higher_is_better=score.higher_is_better,
        num_fewshot=score.num_fewshot,
        limit=limit,
        num_subtasks=len(score.answers) if len(score.answers) > 1 else None,
        detail=score.detail,
        note=score.note,
    )
