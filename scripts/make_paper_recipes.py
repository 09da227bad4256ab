"""Write the recipes below ``qtool/recipes/papers``: the settings of two papers, and their numbers beside them.

Every recipe is written out in full, so that a reader of one sees all of its run; this file holds what they share.
After a change here, run this script and commit the recipes; a test compares both.

    python scripts/make_paper_recipes.py

EfficientQAT (arXiv 2407.11062): rates, epochs, batches and corpus are the paper's; perplexities and mean accuracies
are from its tables, those at 4 bits and of Mistral Large from the README of its code. LR-QAT (arXiv 2406.06385): Table
B1 and Table 4. PEQA (arXiv 2305.14152): as LR-QAT's Table 4 reports it.
"""

import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[1] / "qtool" / "recipes" / "papers"


class Model(NamedTuple):
    """A model of the papers: the name of its recipes, its name in words, and where it is on the hub."""

    name: str
    title: str
    path: str


MODELS = (
    Model("llama-7b", "LLaMA 7B", "huggyllama/llama-7b"),
    Model("llama-2-7b", "Llama-2 7B", "meta-llama/Llama-2-7b-hf"),
    Model("llama-2-13b", "Llama-2 13B", "meta-llama/Llama-2-13b-hf"),
    Model("llama-2-70b", "Llama-2 70B", "meta-llama/Llama-2-70b-hf"),
    Model("llama-3-8b", "Llama-3 8B", "meta-llama/Meta-Llama-3-8B"),
    Model("llama-3-70b", "Llama-3 70B", "meta-llama/Meta-Llama-3-70B"),
    Model("mistral-7b", "Mistral 7B", "mistralai/Mistral-7B-v0.1"),
    Model("mistral-large-123b", "Mistral Large 123B", "mistralai/Mistral-Large-Instruct-2407"),
)
UNREPORTED = "mistral-7b"  # a model with recipes by the settings of EfficientQAT's paper, which has no numbers for it
README = "mistral-large-123b"  # a model whose numbers are in the README of EfficientQAT's code

FIVE = ("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge")
SIX = ("boolq", *FIVE)

# bits and group -> WikiText-2 perplexity, C4 perplexity, mean accuracy in per cent; a column for each model
EFFICIENTQAT: dict[tuple[int, int], dict[str, tuple[float, float | None, float]]] = {
    (4, 128): {
        "llama-2-7b": (5.53, None, 64.27),
        "llama-2-13b": (4.93, None, 67.52),
        "llama-2-70b": (3.39, None, 72.62),
        "llama-3-8b": (6.47, None, 68.43),
        "llama-3-70b": (3.17, None, 74.57),
    },
    (3, 128): {
        "llama-2-7b": (5.81, 7.34, 64.02),
        "llama-2-13b": (5.12, 6.73, 67.28),
        "llama-2-70b": (3.61, 5.71, 71.76),
        "llama-3-8b": (7.09, 10.06, 67.35),
        "llama-3-70b": (4.21, 7.46, 73.96),
    },
    (2, 128): {
        "llama-2-7b": (7.19, 8.79, 59.50),
        "llama-2-13b": (6.08, 7.75, 63.88),
        "llama-2-70b": (4.61, 6.48, 68.93),
        "llama-3-8b": (9.80, 13.22, 59.37),
        "llama-3-70b": (6.38, 9.53, 67.57),
    },
    (2, 64): {
        "llama-2-7b": (6.86, 8.50, 60.14),
        "llama-2-13b": (5.96, 7.59, 64.48),
        "llama-2-70b": (4.52, 6.38, 69.48),
        "llama-3-8b": (9.41, 12.77, 60.76),
        "llama-3-70b": (6.07, 9.23, 67.89),
        "mistral-large-123b": (5.58, None, 73.54),
    },
}

# bits and group (-1: per channel) -> WikiText-2 perplexity, mean accuracy in per cent
LRQAT: dict[tuple[int, int], dict[str, tuple[float, float]]] = {
    (4, -1): {
        "llama-7b": (5.84, 68.54),
        "llama-2-7b": (5.66, 69.72),
        "llama-2-13b": (5.03, 73.19),
        "llama-3-8b": (6.78, 73.84),
        "mistral-7b": (5.46, 74.44),
    },
    (4, 128): {
        "llama-7b": (5.75, 69.15),
        "llama-2-7b": (5.59, 69.88),
        "llama-2-13b": (4.97, 72.91),
        "llama-3-8b": (6.57, 73.66),
        "mistral-7b": (5.37, 75.28),
    },
    (3, -1): {
        "llama-7b": (6.27, 66.60),
        "llama-2-7b": (6.13, 67.70),
        "llama-2-13b": (5.54, 71.22),
        "llama-3-8b": (8.12, 70.46),
        "mistral-7b": (6.03, 71.87),
    },
    (3, 128): {
        "llama-7b": (6.17, 66.81),
        "llama-2-7b": (5.98, 68.62),
        "llama-2-13b": (5.32, 71.51),
        "llama-3-8b": (7.74, 70.48),
        "mistral-7b": (5.80, 72.41),
    },
    (2, -1): {
        "llama-7b": (7.99, 61.77),
        "llama-2-7b": (8.51, 60.03),
        "llama-2-13b": (7.16, 65.28),
        "llama-3-8b": (12.52, 58.49),
        "mistral-7b": (7.98, 65.11),
    },
    (2, 128): {
        "llama-7b": (7.86, 61.60),
        "llama-2-7b": (7.62, 61.70),
        "llama-2-13b": (6.57, 66.75),
        "llama-3-8b": (11.09, 60.46),
        "mistral-7b": (7.92, 65.27),
    },
}

# bits and group (-1: per channel) -> WikiText-2 perplexity, mean accuracy in per cent, of PEQA; columns: PEQA_MODELS
PEQA_MODELS = ("llama-7b", "llama-2-7b", "llama-2-13b", "llama-3-8b", "mistral-7b")
PEQA: dict[tuple[int, int], tuple[list[float], list[float]]] = {
    (4, -1): ([5.86, 5.71, 5.03, 7.51, 5.56], [68.49, 69.23, 72.51, 72.79, 73.73]),
    (4, 128): ([5.75, 5.67, 5.02, 6.89, 5.48], [69.19, 69.64, 72.80, 72.99, 73.34]),
    (3, -1): ([6.56, 6.45, 5.73, 26.20, 6.51], [65.75, 65.44, 69.81, 51.05, 71.02]),
    (3, 128): ([6.22, 6.05, 5.58, 9.64, 5.85], [66.66, 68.10, 70.29, 67.19, 72.21]),
    (2, -1): ([8.24, 9.34, 7.51, 14.47, 8.08], [59.83, 57.40, 62.29, 57.72, 64.48]),
    (2, 128): ([8.12, 7.87, 6.83, 12.39, 8.05], [60.69, 60.74, 64.74, 57.81, 64.65]),
}


def label(num_bits: int, group_size: int) -> str:
    """Return the short name of a grid: ``w2g64``, or ``w4pc`` for one scale in each row."""
    return f"w{num_bits}pc" if group_size == -1 else f"w{num_bits}g{group_size}"


def entry(tasks: tuple[str, ...], metric: str, value: float, source: str) -> str:
    """Return the YAML entry of one published number; accuracies are given in per cent and written as shares."""
    written = f"{value / 100:.4f}" if metric.startswith("acc") else f"{value}"
    return f"  - tasks: [{', '.join(tasks)}]\n    metric: {metric}\n    value: {written}\n    source: {source}\n"


def expected(entries: list[str]) -> str:
    """Return the section of published numbers, empty if there are none."""
    return "\nexpected:\n" + "".join(entries) if entries else ""


EFFICIENTQAT_METHOD = """\
method:
  name: efficientqat
  init: minmax
  epochs: {epochs}
  min_steps: 0
  batch_size: 2
  weight_lr: {weight_lr}
  quant_lr: {quant_lr}
  validation_samples: 64
  optim:
    schedule: cosine
    final_share: 0.05
    eps: 1e-8
  e2e:
    trains: [scales]
    lr: {rate}
    loss: ce
    epochs: 1
    batch_size: 32
    gradient_checkpointing: true
    optim:
      schedule: cosine
      final_share: 0.0
      warmup_share: 0.03
      max_grad_norm: 0.3
      accumulation: 8
"""
PEQA_METHOD = """\
method:
  name: efficientqat
  init: minmax
  epochs: 0
  e2e:
    trains: [scales]
    lr: {rate}
    loss: ce
    steps: 10000
    batch_size: 32
    gradient_checkpointing: true
    optim:
      betas: [0.9, 0.95]
      schedule: linear
      final_share: 0.0
      warmup_share: 0.1
      max_grad_norm: 1.0
      accumulation: 8
"""
LRQAT_METHOD = """\
method:
  name: lrqat
  rank: 32
  alpha: 1.0
  phi: fixed
  factors: zero
  range: search
  norm: 4.0
  lr: 1e-3
  scale_lr: 1e-5
  loss: ce
  steps: 10000
  batch_size: 32
  checkpoint_weights: true
  gradient_checkpointing: true
  optim:
    optimizer: adamw
    betas: [0.9, 0.95]
    schedule: linear
    final_share: 0.0
    warmup_share: 0.1
    max_grad_norm: 1.0
    accumulation: 8
"""
POSITIVE = "\n  negative_scales: false"  # the papers' symmetric grids have positive scales
SLIMPAJAMA = f"""\
data:
  source: slimpajama
  num_samples: 320000
  seq_len: 1024

eval:
  tasks: [wikitext2, {", ".join(SIX)}]
  num_fewshot: 0
  context: 2048
"""


def efficientqat(model: Model, num_bits: int, group_size: int) -> str:
    """Return EfficientQAT's recipe for a model and a grid, by the settings of its paper."""
    found = EFFICIENTQAT[num_bits, group_size].get(model.name)
    rate = "2e-5" if num_bits == 2 else "1e-5"
    large = model.name == README  # it has rates, epochs and a number of windows of its own
    settings = {"weight_lr": "2e-6", "quant_lr": "3e-5", "epochs": 3} if large else {}
    method = EFFICIENTQAT_METHOD.format(**{"weight_lr": rate, "quant_lr": "1e-4", "epochs": 2, "rate": rate} | settings)
    name = f"{model.name}-{label(num_bits, group_size)}"
    known = "as published, with results" if found else "by the settings of its paper"
    entries = []
    if found is not None:
        perplexity, c4, accuracy = found
        paper = "README of EfficientQAT" if large or num_bits == 4 else "arXiv 2407.11062"
        entries = [entry(("wikitext2",), "perplexity", perplexity, f"{paper}, perplexity at 2048 tokens")]
        if c4 is not None:
            entries.append(entry(("c4",), "perplexity", c4, f"{paper}, perplexity at 2048 tokens"))
        entries.append(entry(FIVE, "acc", accuracy, f"{paper}, mean zero-shot accuracy"))
    return f"""\
# EfficientQAT on {model.title} at {label(num_bits, group_size)}, {known}.
#   qtool efficientqat papers/efficientqat/{name}
# arXiv 2407.11062. Other than there: both phases read the same windows, of 2048 tokens (the paper's second phase reads
# 4096 windows of 4096 tokens of the same corpus), a block's best state is kept, not its last, and zero points stay on
# the grid.{"" if found else " The paper has no numbers for this model."}

model:
  path: {model.path}

{method}
quant:
  num_bits: {num_bits}
  group_size: {group_size}
  symmetric: false

data:
  source: redpajama
  num_samples: {2112 if large else 4160}
  seq_len: 2048

eval:
  tasks: [wikitext2, c4, {", ".join(FIVE)}]
  num_fewshot: 0
  context: 2048
{expected(entries)}
output:
  path: ./out/papers/efficientqat/{name}

seed: 2
"""


def rest(num_bits: int, group_size: int, entries: list[str], name: str) -> str:
    """Return the part of a recipe on the text of LR-QAT that begins with the grid; ``name`` is that of its output."""
    return f"""\
quant:
  num_bits: {num_bits}
  group_size: {group_size}
  symmetric: {"false" if num_bits == 2 else "true"}{POSITIVE if num_bits > 2 else ""}

{SLIMPAJAMA}{expected(entries)}
output:
  path: ./out/papers/{name}

seed: 1000
"""


def lrqat(model: Model, num_bits: int, group_size: int) -> str:
    """Return the recipe of one row of LR-QAT's Table 4."""
    perplexity, accuracy = LRQAT[num_bits, group_size][model.name]
    name = f"{model.name}-{label(num_bits, group_size)}"
    table = "arXiv 2406.06385, Table 4"
    entries = [
        entry(("wikitext2",), "perplexity", perplexity, table),
        entry(SIX, "acc_norm", accuracy, table),
    ]
    return f"""\
# LR-QAT on {model.title} at {label(num_bits, group_size)}, as published, with results.
#   qtool lrqat papers/lrqat/{name}
# arXiv 2406.06385, Table B1. Other than there: the last state is kept, not the best on a sample of Wikipedia, and the
# exponent of the range search is 4 for all grids (the paper names it for 4 bits per channel, and has others elsewhere).
# The paper does not say which accuracy it means; its float models have those of acc_norm, or acc where that is all.

model:
  path: {model.path}
  dtype: bfloat16

{LRQAT_METHOD}
{rest(num_bits, group_size, entries, "lrqat/" + name)}"""


def peqa(model: Model, num_bits: int, group_size: int) -> str:
    """Return the recipe of PEQA, the scales alone trained end to end, on the text of LR-QAT's Table 4."""
    index = PEQA_MODELS.index(model.name)
    perplexity, accuracy = (column[index] for column in PEQA[num_bits, group_size])
    name = f"{model.name}-{label(num_bits, group_size)}"
    table = "arXiv 2406.06385, Table 4"
    entries = [entry(("wikitext2",), "perplexity", perplexity, table), entry(SIX, "acc_norm", accuracy, table)]
    return f"""\
# PEQA on {model.title} at {label(num_bits, group_size)}: the scales alone are trained, from rounding to nearest.
#   qtool efficientqat papers/peqa/{name}
# arXiv 2305.14152: E2E-QP without Block-AP. Text, steps and batch are those of LR-QAT (arXiv 2406.06385), which reports
# these numbers. Its rates and ranges for PEQA are not known to us: here are E2E-QP's rates, and the extremes as ranges.

model:
  path: {model.path}
  dtype: bfloat16

{PEQA_METHOD.format(rate=peqa_rate(num_bits))}
{rest(num_bits, group_size, entries, "peqa/" + name)}"""


def peqa_rate(num_bits: int) -> str:
    """Return the learning rate of scales at a width."""
    return "2e-5" if num_bits == 2 else "1e-5"


def recipes() -> dict[Path, str]:
    """Return every recipe, by its file below ``qtool/recipes/papers``."""
    made = {}
    for model in MODELS:
        for (num_bits, group_size), row in EFFICIENTQAT.items():
            if model.name in row or model.name == UNREPORTED:
                name = f"{model.name}-{label(num_bits, group_size)}.yaml"
                made[Path("efficientqat") / name] = efficientqat(model, num_bits, group_size)
        for (num_bits, group_size), numbers in LRQAT.items():
            if model.name in numbers:
                name = f"{model.name}-{label(num_bits, group_size)}.yaml"
                made[Path("lrqat") / name] = lrqat(model, num_bits, group_size)
        for num_bits, group_size in PEQA if model.name == "llama-2-7b" else ():  # others are cells of tables/lrqat-4
            name = f"{model.name}-{label(num_bits, group_size)}.yaml"
            made[Path("peqa") / name] = peqa(model, num_bits, group_size)
    return {file: with_schema(text, "../../recipe.schema.json") for file, text in made.items()}


def with_schema(text: str, schema: str) -> str:
    """Return a recipe with the line after its opening comment that names the JSON schema for editors."""
    return text.replace("\n\n", f"\n# yaml-language-server: $schema={schema}\n\n", 1)


def main() -> int:
    """Write all recipes; name, and keep, files that this script does not make."""
    made = recipes()
    for file, text in made.items():
        (FOLDER / file).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / file).write_text(text, encoding="utf-8")
    others = {path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml")} - made.keys()
    for other in sorted(others):
        print(f"{other} is not made here", file=sys.stderr)
    print(f"{len(made)} recipes below {FOLDER}")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
