"""Settings of the process that are made before the command line is read."""

import gc
import os

import pytest

from qtool import __main__
from qtool.cli import main


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=["nothing", "its own key", "a policy"],
)
def test_waiting_threads_sleep_soon_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], found: str | None
) -> None:
    seen: list[object] = []

    def command() -> int:
        seen.append(os.environ.get("GOMP_SPINCOUNT"))
        return 0

    thresholds = gc.get_threshold()
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(given))
        patch.setattr(main, "main", command)
        patch.setattr(__main__, "_keep_freed", lambda: None)  # it would change the process of the tests
        patch.setattr(os, "_exit", seen.append)
        __main__.main()
    gc.set_threshold(*thresholds)
    assert seen == [found, 0]
