"""Data of lm-eval's tasks, read from files on this machine instead of the hub.

While :func:`local_data` is open, the one method by which lm-eval's tasks fetch a data set looks below ``data_dir()``
first. Prompts and metrics are lm-eval's own, so files have the rows of the data set on the hub.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qtool.data.hub import hub_access, reason
from qtool.data.readers import read_rows
from qtool.data.sources import data_dir
from qtool.system.errors import InputError

# folder below data_dir() by repository and configuration on the hub; * stands for any configuration
LOCAL: dict[tuple[str, str | None], str] = {
    ("aps/super_glue", "boolq"): "boolq",
    ("cais/mmlu", "*"): "mmlu/{name}",
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): "wikitext2",
    ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("baber/piqa", None): "piqa",
    ("allenai/winogrande", "winogrande_xl"): "winogrande",
    ("allenai/openbookqa", "main"): "openbookqa",
}


@contextmanager
def local_data(notes: dict[str, str]) -> Iterator[None]:
    """Let lm-eval's tasks read their data below ``data_dir()``, or from the hub if it is not there.

    Notes on the data that belong to a task's result are put into ``notes`` by task.
    """
    from lm_eval.api.task import ConfigurableTask

    fetch = ConfigurableTask.download

    def download(self: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        folder = _local_folder(self.DATASET_PATH, self.DATASET_NAME)
        if folder is not None and not dataset_kwargs and not callable(self.config.custom_dataset):
            self.dataset, note = _read_folder(folder, pages=self.DATASET_PATH.endswith("wikitext_document_level"))
            if note and self.config.test_split:
                notes[self.config.task] = note
            return
        try:
            with hub_access():
                fetch(self, dataset_kwargs, **kwargs)
        except Exception as error:  # the hub's clients raise errors of many kinds; all mean that there is no data
            raise InputError(
                f"eval.tasks: the data of {self.config.task}, {self.DATASET_PATH}, cannot be read from the Hugging "
                f"Face hub ({reason(error)}), and is not below QTOOL_DATA_DIR ({data_dir() or 'not set'}); "
                "take the task out of eval.tasks, or connect this machine to the network"
            ) from error

    with patch.object(ConfigurableTask, "download", download):
        yield


def _local_folder(repository: str | None, name: str | None) -> Path | None:
    """Return the folder with JSON Lines files of a data set of the hub; ``None`` if there is none."""
    below = LOCAL.get((str(repository), name)) or LOCAL.get((str(repository), "*"))
    root = data_dir()
    if below is None or root is None:
        return None
    folder = root / below.format(name=name)
    return folder if any(folder.glob("*.jsonl")) else None


def _read_folder(folder: Path, pages: bool) -> tuple[Any, str]:
    """Return the splits of a folder as a ``DatasetDict``, and a note if the validation split replaces a test split."""
    import datasets

    rows = {path.stem: [row for _, row in read_rows(path)] for path in sorted(folder.glob("*.jsonl"))}
    if pages:
        rows = {split: [{"page": page} for page in _pages(row["text"] for row in part)] for split, part in rows.items()}
    splits = datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in rows.items()})
    note = ""
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]
        note = f"validation split ({len(splits['test'])} examples): the test split is not below QTOOL_DATA_DIR"
    if "train" not in splits:
        splits["train"] = splits[min(splits)].select([])  # lm-eval needs one, even for 0 examples in the prompt
    return splits, note


def _pages(rows: Iterable[str]) -> list[str]:
    """Join WikiText rows to one text for each article, as in EleutherAI/wikitext_document_level.

    An article begins with a line such as `` = Title = ``. Rows that are blank on the hub are lines of one space in the
    original file, from which that data set was made.
    """
    pages: list[list[str]] = [[]]
    for row in rows:
        line = row.removesuffix("\n") or " "
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    pages[-1].append("")  # the file ends with a newline
    texts = ["\n".join(lines) for lines in pages]
    return [text for text in texts if text.strip()]
