"""The mixtures of grids that llama.cpp calls Q2_K, Q3_K_M, Q4_K_M and Q5_K_M, for ``gguf.grid: k_m``.

They give more bits to the linears whose errors matter most: the values of attention, its output, and the second linear
of an MLP, in the first and last blocks and in every third one. The rules are those of ``llama-quant.cpp`` in
github.com/ggml-org/llama.cpp. Rows that blocks of 256 do not divide get a grid with blocks or groups of 32, as there:
q8_0, which is an affine grid of 8 bits, for q6_k; q5_1 for q5_k; q4_1 for q4_k, where llama.cpp has Q5_0; and Q4_0, an
affine grid of 4 bits, for q3_k and q2_k.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from qtool.config.grids import BLOCK_GRIDS
from qtool.config.quant import QuantConfig, QuantOverride, TableGrid
from qtool.config.recipe import Recipe
from qtool.models.linears import stored_weight
from qtool.models.loaded import LoadedModel
from qtool.system import progress

VALUES = ("*v_proj", "*qkv*", "*query_key_value", "*.c_attn", "*.Wqkv", "*.W_pack", "*.kv_b_proj")
DOWN = ("*.down_proj", "*.w2", "*.mlp.c_proj", "*.fc2", "*.dense_4h_to_h", "*.output_linear")
OUTPUT = ("*.o_proj", "*.attn.c_proj", "*attn*.dense", "*attention.dense", "*.out_proj")
Q8_0 = {"grid": "affine", "num_bits": 8, "group_size": 32, "symmetric": True}
Q4_0 = {"grid": "affine", "num_bits": 4, "group_size": 32, "symmetric": True}
SHORT_ROWS: dict[str, dict[str, Any]] = {  # grids of rows that blocks of 256 do not divide
    "q6_k": Q8_0,
    "q5_k": {"grid": "q5_1"},
    "q4_k": {"grid": "q4_1"},
    "q3_k": Q4_0,
    "q2_k": Q4_0,
}


class Place(NamedTuple):
    """Where a linear is: the number of its block, the number of blocks, and the model's query heads for each key."""

    block: int
    blocks: int
    queries: int

    @property
    def favoured(self) -> bool:
        """True in the first and the last eighth of the blocks, and in every third block between them."""
        first = self.blocks // 8
        return self.block < first or self.block >= 7 * self.blocks // 8 or (self.block - first) % 3 == 2


Rule = Callable[[Place], str]
RULES: dict[str, Mapping[tuple[str, ...], Rule]] = {  # by the grid of all other linears
    "q2_k": {
        VALUES: lambda place: "q4_k" if place.queries >= 4 else "q3_k",
        DOWN: lambda place: "q3_k",
        OUTPUT: lambda place: "q3_k",
    },
    "q3_k": {
        VALUES: lambda place: "q5_k" if place.block < 2 else "q4_k",
        DOWN: lambda place: "q5_k" if place.block < place.blocks // 16 else "q4_k",
        OUTPUT: lambda place: "q4_k",
    },
    "q4_k": {VALUES + DOWN: lambda place: "q6_k" if place.favoured else "q4_k"},
    "q5_k": {VALUES + DOWN: lambda place: "q6_k" if place.favoured else "q5_k"},
}


def quant_of(recipe: Recipe, loaded: LoadedModel) -> QuantConfig:
    """Return the recipe's grids; with ``gguf.grid: k_m`` the mixture's for each linear, and for the embedding.

    The recipe's own overrides, and its grid of the embedding, stay as they are.
    """
    quant = recipe.quant
    if recipe.gguf.grid == "keep":
        return quant
    blocks, config = loaded.blocks(), loaded.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    queries = heads // (getattr(config, "num_key_value_heads", None) or heads)
    overrides, short = {}, []
    for index, (prefix, block) in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                full, place = f"{prefix}.{name}", Place(index, len(blocks), queries)
                grid, columns = grid_of(quant.grid, full, place), stored_weight(module).shape[1]
                fits = columns % BLOCK_GRIDS[grid].block == 0
                short += [] if fits else [columns]
                overrides[full] = QuantOverride.model_validate({"grid": grid} if fits else SHORT_ROWS[grid])
    if short:
        progress.note(
            f"gguf.grid: k_m: {len(short)} of {len(overrides)} linears have rows of {short[0]} weights, which blocks "
            "of 256 do not divide; they get grids with blocks or groups of 32, as in llama.cpp"
        )
    changes: dict[str, Any] = {"overrides": overrides | quant.overrides}
    if "embedding" not in quant.model_fields_set:
        table: Any = loaded.model.get_input_embeddings()  # Any: a class of the model's own
        width = table.weight.shape[1]
        changes["embedding"] = TableGrid(grid="q6_k") if width % 256 == 0 else TableGrid(num_bits=8, group_size=32)
    return quant.model_copy(update=changes)


def grid_of(base: str, name: str, place: Place) -> str:
    """Return the grid of the linear ``name`` in the mixture of ``base``."""
    for patterns, rule in RULES[base].items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return rule(place)
    return base
