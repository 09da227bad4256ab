"""A run tells all faults that can be known before its work in one message."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.whole_runs import Result


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({"quant": {"group_size": 48}}, ["group_size 48 does not divide"]),
        ({"output": {"path": "there"}}, ["there exists"]),
        ({"output": {"path": "there"}, "quant": {"group_size": 48}}, ["there exists", "group_size 48 does not divide"]),
        (
            {
                "method": {"name": "gptq"},
                "data": {"source": "missing.txt"},
                "quant": {"group_size": 48},
                "export": [{"format": "dense", "path": "there"}],
                "output": {"path": "there2"},
            },
            ["no file missing.txt", "there exists", "group_size 48 does not divide", "there2 exists"],
        ),
        (
            {"model": {"path": "./no"}, "method": {"name": "gptq"}, "data": {"source": "missing.txt"}},
            ["there is no folder ./no", "no file missing.txt"],
        ),
    ],
)
def test_what_is_known_before_work_is_said_at_once(
    changes: dict[str, Any], faults: list[str], qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    for name in ("there", "there2"):
        Path(name).mkdir()
        Path(name, "notes.txt").write_text("mine")
    result = qtool_("ptq", recipe(**changes))
    assert result.code == 2
    assert all(result.message.count(fault) >= 1 for fault in faults), result.message
    assert (f"this run has {len(faults)} faults:" in result.message) == (len(faults) > 1)
