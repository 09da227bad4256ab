"""Tiny checkpoints with packed embeddings and output heads, for exports."""

from pathlib import Path
from typing import Any

from torch import Tensor

from helpers import tiny
from helpers.native_checkpoints import exported
from qtool.config.quant import QuantConfig

GRID: dict[str, Any] = {"num_bits": 4, "group_size": 32}
ROWS: dict[str, Any] = {"num_bits": 8, "group_size": -1}
G64: dict[str, Any] = {"num_bits": 4, "group_size": 64}

# keys of quant, beside GRID; the names of those with tied tables begin so
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "tied w8": {"embedding": ROWS},
    "tied w4g64": {"embedding": G64},
    "tied w4g64 asym": {"embedding": {**G64, "symmetric": False}},
    "tied w4g16 asym": {"embedding": {"num_bits": 4, "group_size": 16, "symmetric": False}},
    "tied as linears": {"embedding": GRID},
    "both w8": {"embedding": ROWS},
    "both asym": {"embedding": {**G64, "symmetric": False}},
    "embedding only": {"embedding": ROWS, "head": "float"},
    "embedding w4g64, head w8": {"embedding": G64, "head": ROWS},
}
HEADS: dict[str, dict[str, Any]] = {
    "head w8": {"head": ROWS},
    "head as linears": {"head": GRID},
    "head asym": {"head": {**GRID, "symmetric": False}},
    "head w3, linears skipped": {
        "head": {"num_bits": 3, "group_size": 32},
        "overrides": {"*.up_proj": {"skip": True}},
    },
}
CASES = EMBEDDINGS | HEADS


class Tables:
    """Native checkpoints by case, their logits, and their exports; each is made on first use."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self.logits: dict[str, Tensor] = {}

    def __call__(self, case: str) -> Path:
        """Return the folder of a checkpoint."""
        out, floats = self.at / case.replace(" ", "-"), self.at / ("tied" if case.startswith("tied") else "untied")
        if not out.exists():
            if not floats.exists():
                tiny.llama(floats, tied=case.startswith("tied"))
            model = tiny.quantize(floats, out, QuantConfig.model_validate(GRID | CASES[case])).model
            self.logits[case] = tiny.logits(model)
        return out

    def export(self, name: str, case: str) -> Path:
        """Return the folder of an undamaged export; only read it."""
        out = self.at / "exports" / name / case.replace(" ", "-")
        return out if out.exists() else exported(self(case), name, out)
