"""The results of a report as the hub lists them on a model's page: the ``model-index`` of its card.

Only what was measured on text or tasks that others can have: not the perplexity on text that the model wrote.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from huggingface_hub import EvalResult

from qtool.reports.records import TaskResult
from qtool.system.printable import one_line

DATASETS: dict[str, dict[str, Any]] = {  # keys of EvalResult
    "wikitext2": {
        "dataset_type": "Salesforce/wikitext",
        "dataset_name": "WikiText-2",
        "dataset_config": "wikitext-2-raw-v1",
        "dataset_split": "test",
    },
    "c4": {"dataset_type": "allenai/c4", "dataset_name": "C4", "dataset_config": "en", "dataset_split": "validation"},
}
OWN = ("wikitext2", "c4", "generated", "kl")
FIGURES = ("median", "99th percentile", "99.9th percentile", "maximum")  # of the divergence; its mean is listed
METRICS = {"acc": "accuracy", "acc_norm": "accuracy", "top-1 agreement": "accuracy", "kl": "kl_divergence"}


def results(rows: Sequence[TaskResult]) -> list[EvalResult]:
    """Return the measured ``rows``, without members of task groups, as results of the hub."""
    return [
        EvalResult(
            task_type="text-generation",
            **dataset,
            dataset_args=_known(num_few_shot=row.num_fewshot, limit=row.limit),
            metric_type=METRICS.get(row.metric, one_line(row.metric)),
            metric_name=one_line(f"{row.metric}, against the float model" if row.task == "kl" else row.metric),
            metric_value=row.value,
            metric_args=_known(stderr=row.stderr, n=row.n),
        )
        for row, dataset in _listed(rows)
    ]


def _listed(rows: Sequence[TaskResult]) -> Iterator[tuple[TaskResult, dict[str, Any]]]:
    """Yield the rows that are listed, each with its data set."""
    for row in rows:
        if row.value is None or not math.isfinite(row.value) or row.metric in FIGURES:
            continue
        if row.task not in OWN:
            yield row, {"dataset_type": one_line(row.task), "dataset_name": one_line(row.task)}
        elif (name := "wikitext2" if " of wikitext2" in row.note else row.task) in DATASETS:
            yield row, DATASETS[name]


def _known(**values: float | None) -> dict[str, Any] | None:
    """Return the values that are known and finite; ``None`` for none."""
    return {key: each for key, each in values.items() if each is not None and math.isfinite(each)} or None
