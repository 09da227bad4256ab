"""Write ``qtool/recipes/tables/efficientqat*.yaml`` and ``lrqat*.yaml``: the tables of two papers as sweeps.

A cell of a paper's own method is one of its packaged recipes, numbers and all. A rival is the same recipe with another
``method`` section, 128 calibration windows where it does not train, and the rival's published numbers. Numbers of
methods that qtool lacks (OmniQuant, QuIP#, ...) are left out. After a change here, in ``tuned_tables.py`` or in
``ablation_table.py``, run this script and commit the tables; a test compares both.

    python scripts/make_paper_tables.py
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import ablation_table
import tuned_tables
from make_paper_recipes import (
    EFFICIENTQAT,
    FIVE,
    LRQAT,
    PEQA,
    PEQA_METHOD,
    PEQA_MODELS,
    SIX,
    label,
    peqa_rate,
    with_schema,
)
from table_cells import cell, entry

FOLDER = Path(__file__).parents[1] / "qtool" / "recipes" / "tables"
L17, L27, L213, L270, L38, L370, M7 = (
    *("llama-7b", "llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "llama-3-70b"),
    "mistral-7b",
)
PERPLEXITY = ("wikitext2",)
C4 = ("c4",)
RIVAL = {"data.num_samples": "128"}  # calibration windows of a method that does not train

Numbers = dict[str, float]  # model -> published number
Published = dict[tuple[tuple[str, ...], str], Numbers]  # tasks and metric -> numbers
EQ_MODELS = (L27, L213, L270, L38, L370)
LR_MODELS = (L17, L27, L213, L38, M7)


class Rival(NamedTuple):
    """A method beside the paper's own: its changes to the recipe, and its published numbers."""

    name: str
    changes: dict[str, str]
    published: Published


def by_model(models: Iterable[str], values: Iterable[float | None]) -> Numbers:
    """Return the published numbers of a row, without its gaps."""
    return {model: value for model, value in zip(models, values, strict=True) if value is not None}


def eq_rival(
    name: str, method: str, perplexity: list[float] | None, c4: list[float] | None, acc: list[float | None]
) -> Rival:
    """Return a row of EfficientQAT's tables; columns are Llama-2 7B, 13B, 70B and Llama-3 8B, 70B."""
    published: Published = {(FIVE, "acc"): by_model(EQ_MODELS, acc)}
    if perplexity is not None and c4 is not None:
        before = {
            (PERPLEXITY, "perplexity"): by_model(EQ_MODELS, perplexity),
            (C4, "perplexity"): by_model(EQ_MODELS, c4),
        }
        published = before | published
    return Rival(name, {"method": f"{{name: {method}}}", **(RIVAL if method != "rtn" else {})}, published)


EQ_RIVALS: dict[tuple[int, int], list[Rival]] = {
    (3, 128): [
        eq_rival("rtn", "rtn", None, None, [62.06, 65.77, 70.83, 58.72, 65.29]),
        eq_rival(
            *("gptq", "gptq", [6.29, 5.42, 3.85, 9.58, 5.25], [7.89, 7.00, 5.85, 11.66, 8.64]),
            [62.48, 66.18, 71.47, 60.58, 71.28],
        ),
        eq_rival(
            *("awq", "awq", [6.24, 5.32, 3.74, 8.16, 4.69], [7.84, 6.94, 5.81, 11.49, 7.91]),
            [62.82, 66.14, 71.41, 64.82, 73.65],
        ),
        eq_rival("signround", "signround", None, None, [63.72, 66.68, 71.24, None, None]),
    ],
    (2, 128): [
        eq_rival("gptq", "gptq", None, None, [41.56, 48.29, 34.38, None, None]),
        eq_rival("signround", "signround", None, None, [54.50, 60.72, 67.70, None, None]),
    ],
}

# bits and group -> WikiText-2 perplexity, mean accuracy in per cent; columns: LR_MODELS
LR_RTN: dict[tuple[int, int], tuple[list[float], list[float]]] = {
    (4, -1): ([6.33, 6.14, 5.21, 7.53, 5.91], [68.51, 68.88, 71.73, 72.19, 73.44]),
    (4, 128): ([6.05, 5.78, 5.04, 6.96, 5.49], [68.93, 69.75, 72.94, 72.30, 75.07]),
    (3, -1): ([12.88, 26.73, 8.71, 34.10, 9.49], [54.66, 43.87, 55.01, 47.46, 64.58]),
    (3, 128): ([7.96, 7.61, 6.20, 15.11, 6.77], [63.50, 63.20, 67.60, 57.74, 69.35]),
    (2, -1): ([4.9e3, 5.2e3, 5.2e3, 6.4e4, 6.8e3], [37.92, 36.52, 36.27, 36.80, 36.59]),
    (2, 128): ([708, 2.5e3, 115.6, 1.4e4, 369], [39.74, 37.94, 41.12, 36.97, 41.30]),
}
LR_GPTQ: dict[tuple[int, int], list[float]] = {  # asymmetric; LLaMA and Llama-2 only
    (4, -1): [6.13, 5.83, 5.13],
    (4, 128): [5.85, 5.61, 4.98],
    (3, -1): [8.06, 8.37, 6.44],
    (3, 128): [6.55, 6.29, 5.42],
    (2, -1): [2.1e3, 7.7e3, 2.1e3],
    (2, 128): [44.01, 36.77, 28.14],
}
LR_AWQ: dict[tuple[int, int], list[float]] = {  # LLaMA and Llama-2 only
    (4, -1): [6.08, 6.15, 5.12],
    (4, 128): [5.81, 5.62, 4.97],
    (3, -1): [11.88, 24.00, 10.45],
    (3, 128): [6.46, 6.24, 5.32],
    (2, 128): [2.6e5, 2.2e5, 1.2e5],
}
LR_LSQ: dict[tuple[int, int], tuple[list[float | None], list[float | None]]] = {  # 13B: out of memory there
    (4, -1): ([5.94, 5.77, None, 6.87, 5.73], [68.37, 68.96, None, 73.28, 72.88]),
    (4, 128): ([5.76, 5.61, None, 6.58, 5.67], [69.17, 69.68, None, 73.31, 72.90]),
    (3, -1): ([6.29, 6.14, None, 8.14, 6.06], [66.29, 67.14, None, 69.58, 71.61]),
    (3, 128): ([6.20, 6.02, None, 8.08, 5.90], [66.53, 68.36, None, 70.11, 71.96]),
}
LSQ = """
      name: lsq
      lr: 5e-5
      scale_lr: 1e-5
      weight_decay: 0.1
      loss: ce
      steps: 10000
      batch_size: 32
      gradient_checkpointing: true
      optim: {betas: [0.9, 0.95], schedule: linear, final_share: 0.0, warmup_share: 0.1, max_grad_norm: 1.0, \
accumulation: 8}"""

# grid -> preset, and method -> perplexity and accuracy in per cent; columns: LLaMA 7B, Llama-2 7B, 13B
TABLE_5: dict[str, tuple[str, dict[str, tuple[list[float], list[float]]]]] = {
    "w4a8kv8": (
        "a8",
        {
            "rtn": ([6.88, 6.17, 5.23], [65.83, 68.55, 71.54]),
            "peqa": ([5.89, 5.72, 5.08], [68.53, 69.11, 72.49]),
            "lrqat": ([5.85, 5.67, 5.04], [68.58, 69.32, 73.18]),
        },
    ),
    "w4a8kv4": (
        "a8kv4",
        {
            "rtn": ([7.66, 6.85, 5.78], [62.78, 65.16, 67.06]),
            "peqa": ([6.15, 6.03, 5.27], [66.54, 67.56, 71.35]),
            "lrqat": ([6.07, 5.90, 5.24], [67.16, 69.84, 71.65]),
        },
    ),
    "w4a4kv4": (
        "a4kv4",
        {
            "rtn": ([17.75, 18.98, 11.37], [49.60, 51.75, 55.07]),
            "peqa": ([8.60, 8.72, 7.23], [58.39, 57.93, 62.26]),
            "lrqat": ([8.47, 8.46, 7.15], [59.00, 58.98, 62.65]),
        },
    ),
}


def peqa_method(num_bits: int) -> str:
    """Return PEQA's section ``method``, as a change of a cell."""
    section = PEQA_METHOD.format(rate=peqa_rate(num_bits)).removeprefix("method:")
    return section.replace("\n", "\n    ").rstrip()


def rival_cell(paper: str, model: str, grid: str, rival: Rival, sources: dict[str, str]) -> str:
    """Return the cell of a rival of the paper's own method."""
    published = [
        entry(tasks, metric, numbers[model], sources[metric])
        for (tasks, metric), numbers in rival.published.items()
        if model in numbers
    ]
    columns = {"model": model, "grid": grid, "method": rival.name}
    return cell(f"{model}-{grid}-{rival.name}", columns, f"papers/{paper}/{model}-{grid}", rival.changes, published)


def efficientqat() -> str:
    """Return both of EfficientQAT's tables of weight-only quantization."""
    cells = []
    for (num_bits, group_size), own in EFFICIENTQAT.items():
        grid = label(num_bits, group_size)
        for model in own:
            for rival in EQ_RIVALS.get((num_bits, group_size), []):
                if any(model in numbers for numbers in rival.published.values()):
                    paper = "arXiv 2407.11062"
                    sources = {
                        "perplexity": f"{paper}, perplexity at 2048 tokens",
                        "acc": f"{paper}, mean zero-shot accuracy",
                    }
                    cells.append(rival_cell("efficientqat", model, grid, rival, sources))
            columns = {"model": model, "grid": grid, "method": "efficientqat"}
            cells.append(cell(f"{model}-{grid}", columns, f"papers/efficientqat/{model}-{grid}", {}, []))
    return f"""\
# EfficientQAT's tables: perplexity and zero-shot accuracy of weight-only quantization.
#   qtool sweep tables/efficientqat
# arXiv 2407.11062; 4 bits, and Mistral Large, from the README of its code. How it calibrated the others is not told:
# here they have 128 windows of the same corpus.

missing_models: skip
cells:
{"".join(cells)}"""


def lrqat_4() -> str:
    """Return LR-QAT's Table 4."""
    table = "arXiv 2406.06385, Table 4"
    sources = dict.fromkeys(("perplexity", "acc_norm"), table)
    cells = []
    for (num_bits, group_size), own in LRQAT.items():
        key, grid = (num_bits, group_size), label(num_bits, group_size)
        rivals = [
            Rival(
                "rtn",
                {"method": "{name: rtn}"},
                {
                    (PERPLEXITY, "perplexity"): by_model(LR_MODELS, LR_RTN[key][0]),
                    (SIX, "acc_norm"): by_model(LR_MODELS, LR_RTN[key][1]),
                },
            ),
            Rival(
                "gptq",
                {"method": "{name: gptq}", "quant.symmetric": "false", **RIVAL},
                {(PERPLEXITY, "perplexity"): by_model((L17, L27, L213), LR_GPTQ[key])},
            ),
        ]
        if key in LR_AWQ:
            numbers: Published = {(PERPLEXITY, "perplexity"): by_model((L17, L27, L213), LR_AWQ[key])}
            rivals.append(Rival("awq", {"method": "{name: awq}", **RIVAL}, numbers))
        if key in LR_LSQ:
            perplexity, accuracy = LR_LSQ[key]
            numbers = {
                (PERPLEXITY, "perplexity"): by_model(LR_MODELS, perplexity),
                (SIX, "acc_norm"): by_model(LR_MODELS, accuracy),
            }
            rivals.append(Rival("lsq", {"method": LSQ}, numbers))
        numbers = {
            (PERPLEXITY, "perplexity"): by_model(PEQA_MODELS, PEQA[key][0]),
            (SIX, "acc_norm"): by_model(PEQA_MODELS, PEQA[key][1]),
        }
        rivals.append(Rival("peqa", {"method": peqa_method(num_bits)}, numbers))
        for model in own:
            for rival in rivals:
                if any(model in numbers for numbers in rival.published.values()):
                    cells.append(rival_cell("lrqat", model, grid, rival, sources))
            columns = {"model": model, "grid": grid, "method": "lrqat"}
            cells.append(cell(f"{model}-{grid}", columns, f"papers/lrqat/{model}-{grid}", {}, []))
    return f"""\
# LR-QAT's Table 4: perplexity and accuracy of weights alone, per channel and in groups.
#   qtool sweep tables/lrqat-4
# arXiv 2406.06385. Full training (lsq) by its Table B1; PEQA as in papers/peqa. How GPTQ and AWQ were calibrated is not
# told: here they have 128 windows of the same corpus. GPTQ and all of 2 bits are asymmetric, as there.

missing_models: skip
cells:
{"".join(cells)}"""


def lrqat_5() -> str:
    """Return LR-QAT's Table 5."""
    table = "arXiv 2406.06385, Table 5"
    cells = []
    for grid, (preset, methods) in TABLE_5.items():
        for index, model in enumerate((L17, L27, L213)):
            for method, (perplexity, accuracy) in methods.items():
                changes = {"quant.preset": preset}
                if method != "lrqat":
                    changes["method"] = peqa_method(4) if method == "peqa" else "{name: rtn}"
                columns = {"model": model, "grid": grid, "method": method}
                published = [
                    entry(PERPLEXITY, "perplexity", perplexity[index], table),
                    entry(SIX, "acc_norm", accuracy[index], table),
                ]
                name = f"{model}-{grid}-{method}"
                cells.append(cell(name, columns, f"papers/lrqat/{model}-w4pc", changes, published))
    return f"""\
# LR-QAT's Table 5: weights of 4 bits; activations, keys and values of 8 and 4 bits.
#   qtool sweep tables/lrqat-5
# arXiv 2406.06385. Weights per channel and symmetric; what linears read, keys and values are ranged for each token.

missing_models: skip
cells:
{"".join(cells)}"""


def tables() -> dict[str, str]:
    """Return every table, by the name of its file."""
    made = {
        "efficientqat.yaml": efficientqat(),
        "efficientqat-ablation.yaml": ablation_table.table(),
        **tuned_tables.tables(),
        "lrqat-4.yaml": lrqat_4(),
        "lrqat-5.yaml": lrqat_5(),
    }
    return {name: with_schema(text, "../sweep.schema.json") for name, text in made.items()}


def main() -> int:
    """Write all tables."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in tables().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(tables())} tables below {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
