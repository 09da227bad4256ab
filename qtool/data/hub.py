"""Data sets on the Hugging Face hub, and what happens when it cannot be reached."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch
from urllib.parse import urlsplit
from urllib.request import getproxies

from qtool.system.errors import InputError, first_line

PROBE_SECONDS = 5.0


class UnreachableError(InputError):
    """Data is not on this machine, and the hub cannot be reached or does not have it."""


@cache
def _hub_answers() -> bool:
    """Whether a connection to the hub can be made, or is left to a proxy."""
    from huggingface_hub import constants

    if getproxies().get("https"):
        return True
    url = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def hub_access() -> Iterator[None]:
    """Inside, libraries use the hub; when it does not answer, only what it left in its cache on this machine.

    Left to themselves they try for half a minute before they say so.
    """
    if _hub_answers():
        yield
        return
    import datasets
    from huggingface_hub import constants

    with patch.object(constants, "HF_HUB_OFFLINE", True), patch.object(datasets.config, "HF_HUB_OFFLINE", True):
        yield


class Hub(NamedTuple):
    """A data set on the hub, and how it is read."""

    repository: str
    name: str | None = None  # of the configuration
    streaming: bool = False  # rows are fetched as they are asked for; otherwise the split is downloaded whole
    files: str | None = None  # pattern of JSON Lines files to read, where the repository has a script for a loader
    sorted: bool = False  # by origin: read in an order of its own, drawn once, so that its beginning is a fair sample


def load_hub(hub: Hub, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a data set on the hub.

    Raises:
        UnreachableError: it cannot be had.
    """
    import datasets

    try:
        with hub_access():
            if hub.files is None:
                rows = datasets.load_dataset(hub.repository, hub.name, split=split, streaming=hub.streaming)
            else:  # as lines: the fields beside the text differ from file to file, which no table can hold
                files = f"hf://datasets/{hub.repository}/{hub.files}"
                rows = datasets.load_dataset("text", data_files={split: files}, split=split, streaming=hub.streaming)
        for row in rows.shuffle(seed=0) if hub.sorted else rows:
            yield row if hub.files is None else json.loads(row["text"])
    except Exception as error:  # the hub's clients raise many kinds, and all of them mean: there is no such data here
        raise UnreachableError(
            f"{hub.repository} cannot be read from the Hugging Face hub ({first_line(error)})"
        ) from error
