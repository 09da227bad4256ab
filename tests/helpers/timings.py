"""Timings that are told, not measured."""

from typing import Any

import pytest
import torch

from qtool.config.quant import QuantSpec
from qtool.quant import kernel_timing, kernels
from qtool.quant.kernel_timing import EXACT, Timing


def told(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[tuple[int, int]]:
    """Let the ways take ``seconds``, and others 1 s; return the list of shapes that are asked for."""
    asked = []

    def timing(spec: QuantSpec, out: int, in_: int, dtype: torch.dtype, device: torch.device) -> Timing:
        asked.append((out, in_))
        able = kernel_timing.backends_for(dtype, device)
        reasons: dict[str, Any] = {each.name: kernels.unfit(each, spec, out, in_) for each in able}
        possible = [EXACT, *(name for name, reason in reasons.items() if reason is None)]
        found = {name: seconds.get(name, 1.0) for name in possible}
        return Timing(out, in_, spec, found, {name: reason for name, reason in reasons.items() if reason})

    monkeypatch.setattr(kernel_timing, "timing", timing)
    return asked
