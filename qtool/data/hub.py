"""Data sets on the Hugging Face hub, and a quick answer when the hub cannot be reached."""

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

PROBE_SECONDS = 5.0  # longest wait for a connection to the hub


class UnreachableError(InputError):
    """Data is not on this machine, and the hub cannot be reached or does not have the data."""


class Hub(NamedTuple):
    """A data set on the hub, and how it is read."""

    repository: str
    name: str | None = None  # the configuration
    streaming: bool = False  # True: rows are fetched one by one; False: the split is downloaded whole
    files: str | None = None  # pattern of JSON Lines files to read, if the repository has a loading script only
    sorted: bool = False  # True: rows are sorted by origin; shuffle them once, so that a fair sample comes first


@contextmanager
def hub_access() -> Iterator[None]:
    """Let libraries use the hub inside the ``with`` block, or only their cache on this machine if it does not answer.

    Without this, libraries retry for half a minute before they fail.
    """
    if hub_answers():
        yield
        return
    import datasets
    from huggingface_hub import constants

    with patch.object(constants, "HF_HUB_OFFLINE", True), patch.object(datasets.config, "HF_HUB_OFFLINE", True):
        yield


@cache
def hub_answers() -> bool:
    """Return whether the hub accepts a connection; with a proxy, which decides by itself, always true."""
    from huggingface_hub import constants

    if getproxies().get("https"):
        return True
    try:
        url = urlsplit(constants.ENDPOINT)
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname or "", port), timeout=PROBE_SECONDS).close()
    except (OSError, ValueError):  # ValueError: HF_ENDPOINT is no URL
        return False
    return True


def reason(error: Exception) -> str:
    """Return why data could not be read from the hub: what keeps this machine from asking it, or else ``error``."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return first_line(error) if hub_answers() else f"{constants.ENDPOINT} does not answer"


def load_hub(hub: Hub, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set on the hub.

    Raises:
        UnreachableError: the data set cannot be read from the hub.
    """
    import datasets

    try:
        with hub_access():
            if hub.files is None:
                rows = datasets.load_dataset(hub.repository, hub.name, split=split, streaming=hub.streaming)
            else:  # as lines of text: fields differ from file to file, which a table cannot hold
                files = f"hf://datasets/{hub.repository}/{hub.files}"
                rows = datasets.load_dataset("text", data_files={split: files}, split=split, streaming=hub.streaming)
        for row in rows.shuffle(seed=0) if hub.sorted else rows:
            yield row if hub.files is None else json.loads(row["text"])
    except Exception as error:  # the hub's clients raise errors of many kinds; all mean that the data is not here
        raise UnreachableError(
            f"{hub.repository} cannot be read from the Hugging Face hub ({reason(error)})"
        ) from error
