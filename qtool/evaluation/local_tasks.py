"""Data of lm-eval's tasks read from files on this machine instead of the hub."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qtool.data.hub import hub_access
from qtool.data.readers import read_rows
from qtool.data.sources import data_dir
from qtool.system.errors import InputError, first_line

# (repository and configuration on the hub) -> folder below data_dir(); * stands for any configuration
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
    """Inside, lm-eval's tasks take their data from ``data_dir()`` where that has it, and from the hub otherwise.

    ``notes`` gets, by task, what a reader of its result must know of that data.
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
        except Exception as error:  # the hub's clients raise many kinds, and all of them mean: there is no such data
            raise InputError(
                f"eval.tasks: the data of {self.config.task}, {self.DATASET_PATH}, cannot be read from the Hugging "
                f"Face hub ({first_line(error)}), and is not below QTOOL_DATA_DIR ({data_dir() or 'not set'}); "
                "take the task out of eval.tasks, or go where there is a network"
            ) from error

    with patch.object(ConfigurableTask, "download", download):
        yield


def _local_folder(repository: str | None, name: str | None) -> Path | None:
    below = LOCAL.get((str(repository), name)) or LOCAL.get((str(repository), "*"))
    root = data_dir()
    if below is None or root is None:
        return None
    folder = root / below.format(name=name)
    return folder if any(folder.glob("*.jsonl")) else None


def _read_folder(folder: Path, pages: bool) -> tuple[Any, str]:
    """The splits of a folder as a ``DatasetDict``, and a note when one stands in for another."""
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
        splits["train"] = splits[min(splits)].select([])  # lm-eval lists it even for 0 examples in the prompt
    return splits, note


def _pages(rows: Iterable[str]) -> list[str]:
    """WikiText rows put together as one text for each article, as EleutherAI/wikitext_document_level has them.

    An article begins with a line such as `` = Title = ``. The blank rows of the hub are lines of one space in the
    original file, which that data set is made from.
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
