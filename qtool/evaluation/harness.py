"""lm-eval's tasks on a loaded model: with its prompts, its metrics and its code; only the place of the data may differ.

Data sets below ``data_dir()`` are read from there (``local_tasks.py``), all others come from the hub. Around every call
into lm-eval, progress is shown as qtool's own, nothing is printed to standard output, and the random state is kept.
"""

import copy
import logging
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from qtool.data.sources import data_dir
from qtool.data.vocabulary import checked_ids
from qtool.evaluation.local_tasks import local_data
from qtool.evaluation.paired import Answers, answers
from qtool.models.loaded import LoadedModel
from qtool.models.tokenizer import load_processor
from qtool.reports.records import Metric
from qtool.system import progress
from qtool.system.errors import InputError, listing, nearest

# Any in this file: lm-eval and datasets carry no types, and lm-eval's results are nested dicts of its own making.

# folder in lm_eval/tasks by task: for these tasks, the index of all 14,000 task files, 11 s of work, is not needed
FOLDERS = {
    "boolq": "super_glue/boolq",
    "mmlu": "mmlu/default",
    "wikitext": "wikitext",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
}
# the name of a task, a group or a tag in a file of lm-eval's tasks
NAMED = re.compile(r"""^[ -]*(?:task|group|tag): *["']?([\w.-]+)["']? *$""", re.MULTILINE)
LOGIT_BYTES = 128 << 20  # largest size of the float32 logits of one forward on a CPU


@dataclass(frozen=True)
class Score:
    """One metric of one task, as lm-eval gives it."""

    task: str
    metric: str
    measured: Metric
    higher_is_better: bool | None
    num_fewshot: int | None
    detail: bool  # True: a part of a group, which has a row of its own
    note: str
    answers: tuple[Answers | None, ...]  # one for the task, or one for each task of the group


def check(tasks: Sequence[str], num_fewshot: int | dict[str, int]) -> None:
    """Refuse tasks that lm-eval does not have, or whose data cannot be read; data on the hub is downloaded now.

    Raises:
        InputError: there is such a task.
    """
    _check_written(tasks)
    unknown = [task for task in tasks if task not in _manager(task).all_tasks]
    if unknown:
        raise InputError(listing("eval.tasks:", (_unknown(task, _full_manager().all_tasks) for task in unknown)))
    for task in tasks:
        shots = num_fewshot if isinstance(num_fewshot, int) else num_fewshot.get(task)
        with _harness():
            loaded = _manager(task).load([task])
        for name, part in loaded["tasks"].items():
            wanted = shots if shots is not None else part.config.num_fewshot
            if wanted and hasattr(part, "sampler") and not len(part.sampler.df):
                raise InputError(
                    f"eval.num_fewshot: {name} is asked for with {wanted} example(s), and the split that they come "
                    f"from is not below {data_dir()}; ask for 0, or unset QTOOL_DATA_DIR to use the hub"
                )


def reads_pictures(task: str) -> bool:
    """Return whether a task that lm-eval knows, or a part of it, asks about pictures or sound."""
    index = _manager(task).task_index

    def reads(name: str) -> bool:
        config = getattr(index.get(name), "cfg", None) or {}
        parts = config.get("task")
        parts = [part for part in parts if isinstance(part, str)] if isinstance(parts, list) else []
        return bool(config.get("doc_to_image") or config.get("doc_to_audio")) or any(map(reads, parts))

    return reads(task)


def _check_written(tasks: Iterable[str]) -> None:
    """Refuse names that no file of lm-eval's tasks contains: a second of work, where its index takes eleven.

    Raises:
        InputError: there is such a name.
    """
    spec = find_spec("lm_eval.tasks")
    assert spec is not None
    assert spec.origin is not None
    missing = {task: re.compile(rf"(?<![\w.-]){re.escape(task)}(?![\w.-])") for task in tasks if task not in FOLDERS}
    names: set[str] = set()
    for file in Path(spec.origin).parent.rglob("*") if missing else ():
        if file.suffix in (".py", ".pyc", ".md") or not file.is_file():  # a file that others include has any suffix
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        names.update(NAMED.findall(text))
        for task in [task for task, written in missing.items() if written.search(text)]:
            del missing[task]
        if not missing:
            return
    if missing:
        raise InputError(listing("eval.tasks:", (_unknown(task, names) for task in missing)))


def _unknown(task: str, known: Iterable[str]) -> str:
    hint = nearest(task, [*known, "wikitext2", "c4", "generated"], "; the nearest names are {}", 3)
    return f"lm-eval has no task {task!r}{hint}"


@cache
def _manager(task: str) -> Any:
    """Return lm-eval's task manager for the folder of ``task`` if it is in ``FOLDERS``, else for all folders."""
    import lm_eval.tasks

    folder = FOLDERS.get(task) or (FOLDERS["mmlu"] if task.startswith("mmlu_") else None)
    if folder is not None:
        path = Path(lm_eval.tasks.__file__).parent / folder
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=path)
        if task in manager.all_tasks:
            return manager
    return _full_manager()


@cache
def _full_manager() -> Any:
    import lm_eval.tasks

    with progress.stage("reading lm-eval's list of tasks"):
        return lm_eval.tasks.TaskManager()


def run(
    loaded: LoadedModel, task: str, num_fewshot: int | None, limit: int | None, batch_size: int | str, title: str
) -> list[Score]:
    """Measure ``task``, a name that lm-eval knows, with lm-eval's ``simple_evaluate``; return all its metrics.

    Raises:
        InputError: the task asks about pictures, and the model has no processor for them.
    """
    import lm_eval.evaluator

    pictures = reads_pictures(task)
    with progress.stage(title), _harness() as seen, checked_ids(loaded, f"the text of {task}"):
        model = _with_pictures(loaded, batch_size) if pictures else _text_only(loaded, batch_size)
        results = lm_eval.evaluator.simple_evaluate(
            model=model,
            tasks=[task],
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=True,
            task_manager=_manager(task),
            apply_chat_template=pictures and bool(model.processor.chat_template),
        )
    scores = list(_scores(results, seen, loaded.max_length))
    return sorted(scores, key=lambda score: (score.task != task, score.detail))


def _text_only(loaded: LoadedModel, batch_size: int | str) -> Any:
    """Return lm-eval's view of a model and its tokenizer."""
    from lm_eval.models.huggingface import HFLM

    from qtool.evaluation.batches import by_tokens

    tokenizer = copy.deepcopy(loaded.tokenizer)  # lm-eval sets a padding token
    tokenizer.model_max_length = sys.maxsize  # lm-eval cuts to the context itself, so no warning is due
    known = batch_size != "auto" or loaded.device.type != "cpu"
    view: Any = HFLM if known else by_tokens(max(1, LOGIT_BYTES // _token_bytes(loaded)))
    return view(
        pretrained=loaded.model,
        tokenizer=tokenizer,
        batch_size=_batch_size(loaded) if batch_size == "auto" else batch_size,
        max_length=loaded.max_length,
    )


def _with_pictures(loaded: LoadedModel, batch_size: int | str) -> Any:
    """Return lm-eval's view of a multimodal model and its processor; it has no search for a batch size."""
    from lm_eval.models.hf_vlms import HFMultimodalLM

    load_processor(loaded.path, loaded.folder)  # lm-eval loads it by itself; this says clearly if it cannot be
    loaded.model.name_or_path = str(loaded.folder)  # where lm-eval looks for it
    return HFMultimodalLM(
        pretrained=loaded.model,
        batch_size=1 if batch_size == "auto" else batch_size,
        max_length=loaded.max_length,
        convert_img_format=True,
    )


def _batch_size(loaded: LoadedModel) -> int | str:
    """Return the batch size for ``auto``: on a GPU lm-eval's search; on a CPU, where it would not end, a fixed one."""
    if loaded.device.type != "cpu":
        return "auto"
    return max(1, min(64, LOGIT_BYTES // (loaded.max_length * _token_bytes(loaded))))


def _token_bytes(loaded: LoadedModel) -> int:
    """Return the bytes of the float32 logits of one token."""
    return int(loaded.model.config.get_text_config().vocab_size) * 4


def _scores(results: dict[str, Any], seen: "_HarnessLog", max_length: int) -> Iterator[Score]:
    groups = results.get("group_subtasks", {})
    aggregated = {name for name in groups if any("," in key for key in results["results"].get(name, {}))}
    within = {child for name in aggregated for child in groups[name]}
    for name, values in results["results"].items():
        parts = _leaves(name, groups) if name in groups else [name]
        for key, value in values.items():
            metric, _, rest = key.partition(",")
            if not rest or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{rest}")
            yield Score(
                task=name,
                metric=metric if rest == "none" else f"{metric} ({rest})",
                measured=Metric(
                    value=value,
                    stderr=error if isinstance(error, int | float) else None,
                    n=sum(results["n-samples"][part]["effective"] for part in parts),
                ),
                higher_is_better=results["higher_is_better"][parts[0]].get(metric),
                num_fewshot=results["n-shot"].get(name, results["n-shot"].get(parts[0])),
                detail=name in within,
                note="" if name in within else seen.note(parts, max_length),
                answers=tuple(answers(results["samples"][part], metric, rest) for part in parts),
            )


def _leaves(name: str, groups: dict[str, list[str]]) -> list[str]:
    return [leaf for child in groups[name] for leaf in (_leaves(child, groups) if child in groups else [child])]


class _HarnessLog(logging.Handler):
    """Collects notes while lm-eval runs: on replaced splits, and on prompts that were cut."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[str, str] = {}  # by task
        self.num_cut = 0

    def emit(self, record: logging.LogRecord) -> None:
        if "exceeds model's maximum length" in record.msg:
            self.num_cut += 1
        elif record.levelno >= logging.ERROR:
            progress.note(f"lm-eval: {record.getMessage()}")

    def note(self, tasks: Iterable[str], max_length: int) -> str:
        """Return all notes that belong to the result of ``tasks``, in one line."""
        notes = list(dict.fromkeys(self.notes[task] for task in tasks if task in self.notes))
        if self.num_cut:
            notes.append(f"{self.num_cut} prompts of more than {max_length} tokens were cut from the left")
        return "; ".join(notes)


@contextmanager
def _harness() -> Iterator[_HarnessLog]:
    """Surround a call into lm-eval: local data, qtool's progress, no output, the same random state afterwards."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.hf_vlms
    import lm_eval.models.huggingface

    seen = _HarnessLog()
    logger = logging.getLogger("lm_eval")
    state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(local_data(seen.notes))
        stack.enter_context(redirect_stdout(sys.stderr))  # lm-eval prints; standard output is for results
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(patch.object(lm_eval.models.huggingface, "tqdm", _Bar))
        stack.enter_context(patch.object(lm_eval.models.hf_vlms, "tqdm", _Bar))
        stack.enter_context(patch.object(lm_eval.api.model, "tqdm", _plain))
        stack.enter_context(patch.object(lm_eval.api.task, "tqdm", _plain))
        # lm-eval runs git, whose error goes to the terminal by itself and breaks the live display
        stack.enter_context(patch.object(lm_eval.evaluator, "get_git_commit_hash", lambda: None))
        stack.enter_context(patch.object(logger, "handlers", [seen]))
        stack.enter_context(patch.object(logger, "propagate", False))
        level = logger.level
        logger.setLevel(logging.WARNING)  # lm-eval warns of prompts that it cuts
        try:
            yield seen
        finally:
            logger.setLevel(level)
            random.setstate(state[0])
            np.random.set_state(state[1])


# Any: whatever tqdm is called with
def _plain(items: Iterable[Any], *args: Any, **kwargs: Any) -> Iterable[Any]:
    """Replace the progress bar of a short task by none."""
    return items


class _Bar:
    """Shows lm-eval's progress as qtool's; it has the part of tqdm's interface that lm-eval uses."""

    def __init__(self, items: Sequence[Any] = (), *args: Any, total: int = 0, desc: str = "", **kwargs: Any) -> None:
        self.title = desc.removeprefix("Running ") or "requests"
        self.items = items
        self.steps = iter(progress.track(range(total), self.title, total)) if total else iter(())
        next(self.steps, None)

    def __iter__(self) -> Iterator[Any]:
        return progress.track(self.items, self.title, len(self.items))

    def update(self, count: int = 1) -> None:
        for _ in range(count):
            next(self.steps, None)

    def close(self) -> None:
        for _ in self.steps:
            pass
