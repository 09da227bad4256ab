"""Native checkpoints of tiny models, their exports, and functions that read both."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import tiny
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import BITS, QuantConfig
from qtool.config.sections import ExportConfig, ModelConfig
from qtool.exporters import _readback
from qtool.pipelines import export as exporting

GRIDS = {
    f"w{bits}{'g32' if group > 0 else 'pc'}{'' if symmetric else '-asym'}": QuantConfig(
        num_bits=bits, group_size=group, symmetric=symmetric
    )
    for bits in BITS
    for group in (-1, 32)
    for symmetric in (True, False)
} | {  # scales of 8 bits are positive unless the recipe says otherwise
    f"w8{'g32' if group > 0 else 'pc'}-neg": QuantConfig(num_bits=8, group_size=group, negative_scales=True)
    for group in (-1, 32)
}
MIXED = {
    "mixed": QuantConfig.model_validate(
        {
            "num_bits": 4,
            "group_size": 32,
            "overrides": {
                "*.down_proj": {"num_bits": 8},
                "*.v_proj": {"num_bits": 2, "group_size": -1},
                "*.1.mlp.up_proj": {"num_bits": 3},
            },
        }
    ),
    "mixed-asym": QuantConfig.model_validate(
        {"num_bits": 3, "group_size": 32, "symmetric": False, "overrides": {"*.down_proj": {"num_bits": 8}}}
    ),
    "skipped": QuantConfig.model_validate({"group_size": 32, "overrides": {"*.1.mlp.up_proj": {"skip": True}}}),
}
# scales of 2 / 15 of a weight, which only float32 holds; with negative scales they are an eighth of a bfloat16 weight
FLOAT32_SCALES = {"group_size": 32, "scale_dtype": "float32", "negative_scales": False}
PLAIN = {"gemma": "w4pc"}  # a grid of 4 symmetric bits that a format holds, where that is not w4g32
Q_PROJ = "model.layers.0.self_attn.q_proj"


def negative(folder: Path) -> bool:
    """Return whether a linear of the native checkpoint ``folder`` has a negative scale."""
    source = NativeCheckpoint(folder)
    return any(bool((source.quantized(name).scale < 0).any()) for name in source.specs)


class Natives:
    """Native checkpoints of the tiny models by family and grid, and their exports; each is made on first use.

    Where a grid lets scales be negative, some are, so that whatever reads an export has read such scales.
    """

    def __init__(self, at: Path) -> None:
        self.at = at
        self.logits: dict[Path, Tensor] = {}

    def floats(self, grid: str = "w4g32", family: str = "llama") -> Path:
        """Return the folder of the float model; a Llama has one block, or two if the grids of a mix differ by block."""
        blocks = 2 if grid in MIXED else 1
        folder = self.at / (f"llama-{blocks}" if family == "llama" else family)
        if not folder.exists():
            tiny.llama(folder, blocks=blocks) if family == "llama" else tiny.FAMILIES[family](folder)
        return folder

    def __call__(self, grid: str = "w4g32", family: str = "llama") -> Path:
        out = self.at / f"{family}-{grid}"
        if not out.exists():
            written = tiny.quantize(self.floats(grid, family), out, (GRIDS | MIXED)[grid])
            self.logits[out] = tiny.logits(written.model)
            assert negative(out) == any(spec.signed for spec in tiny.specs(written).values()), grid
        return out

    def plain(self, name: str) -> Path:
        """Return the checkpoint that ``export`` takes for the format ``name`` without a grid."""
        return self(PLAIN.get(name, "w4g32"))

    def export(self, name: str, grid: str = "") -> Path:
        """Return the folder of an undamaged export; only read it."""
        grid = grid or PLAIN.get(name, "w4g32")
        out = self.at / "exports" / f"{grid}-{name}"
        return out if out.exists() else exported(self(grid), name, out)


def exported(folder: Path, name: str, out: Path, dtype: str = "auto", overwrite: bool = False) -> Path:
    config = ExportConfig(format=name, path=out, dtype=dtype)
    return exporting.export(folder, config, overwrite)


def plain(folder: Path, **options: object) -> torch.nn.Module:
    """Load the model with plain transformers, in float32."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model


def read_back(folder: Path) -> Tensor:
    """Return the logits of an export that is loaded as ``qtool eval`` loads it."""
    loaded = _readback.load_exported(ModelConfig(path=str(folder), dtype="float32", device="cpu"))
    assert loaded is not None
    return tiny.logits(loaded.model)
