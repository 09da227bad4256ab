"""The progress bars of transformers and of the hub, hidden while qtool shows progress of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the progress bars inside the ``with`` block or the decorated function, then restore the user's setting.

    The setting belongs to the process: its other threads show no progress bars meanwhile either.
    """
    shown, shown_by_hub = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # the hub's too
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if shown_by_hub:
            enable_progress_bars()
        else:
            disable_progress_bars()
