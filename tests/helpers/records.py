"""Records of reports for tests."""

from collections.abc import Sequence
from typing import Any

from qtool.reports.records import Lock, Series


def locked(**keys: Any) -> Lock:  # Any: whatever key of a lock a test is about
    """A lock of nothing in particular."""
    base: dict[str, Any] = {"model": {}, "method": {}, "quant": {}, "data": {}, "seed": 0, "model_files": {}}
    return Lock.model_validate(base | {"versions": {}, "processor": "cpu", "threads": 1, "processes": 1} | keys)


def per_block(*errors: float) -> Series:
    """The errors of the blocks."""
    return Series(name="block_error", per="block", at=tuple(range(len(errors))), values=errors)


def per_step(name: str, losses: Sequence[float]) -> Series:
    """A loss by step."""
    return Series(name=name, per="step", at=tuple(range(1, len(losses) + 1)), values=tuple(losses))
