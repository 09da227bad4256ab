"""EfficientQAT's tables of tuned models, as sweeps: Llama-3 Instruct on deita, and LLaMA on Alpaca.

Their second phase reads a text of its own. So each number takes two cells: Block-AP on the corpus, and E2E-QP alone on
the other text, from the checkpoint of the first. ``make_paper_tables.py`` writes the files.
"""

from make_paper_recipes import FIVE, label
from table_cells import cell, entry

GRIDS = ((4, 128), (3, 128), (2, 64), (2, 128))
# model -> its path and the base model whose recipes it takes; WikiText-2 perplexity and mean accuracy, by GRIDS
INSTRUCT: dict[str, tuple[str, str, list[float], list[float]]] = {
    "llama-3-8b-instruct": (
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "llama-3-8b",
        [7.93, 8.55, 11.19, 11.73],
        [68.39, 67.24, 60.66, 60.16],
    ),
    "llama-3-70b-instruct": (
        "meta-llama/Meta-Llama-3-70B-Instruct",
        "llama-3-70b",
        [5.35, 5.65, 7.86, 8.14],
        [73.47, 72.87, 67.64, 67.54],
    ),
}

LLAMA = {"llama-7b": "huggyllama/llama-7b", "llama-13b": "huggyllama/llama-13b"}
# bits and group (-1: per channel) -> MMLU accuracy in per cent of EfficientQAT and of PEQA; columns: LLAMA
ALPACA: dict[tuple[int, int], tuple[list[float], list[float]]] = {
    (4, -1): ([38.8, 48.2], [35.8, 45.0]),
    (4, 64): ([41.2, 49.5], [39.4, 47.4]),
    (3, 64): ([40.0, 48.2], [38.5, 46.3]),
    (2, 64): ([32.6, 40.9], [28.1, 32.2]),
}
PAPER = "arXiv 2407.11062"


def second_phase(first: str) -> dict[str, str]:
    """Return the changes by which a cell is E2E-QP alone, from the checkpoint of the cell ``first``."""
    return {"start": first, "method.epochs": "0"}


def instruct() -> str:
    """Return EfficientQAT's rows of Llama-3 Instruct."""
    cells, table = [], "efficientqat-instruct"
    for model, (path, base, perplexities, accuracies) in INSTRUCT.items():
        for grid, perplexity, accuracy in zip(GRIDS, perplexities, accuracies, strict=True):
            recipe, first = f"papers/efficientqat/{base}-{label(*grid)}", f"{model}-{label(*grid)}-block-ap"
            columns = {"model": model, "grid": label(*grid)}
            changes = {"model.path": path, "method.e2e.steps": "0", "expected": "[]"}
            cells.append(cell(first, columns | {"method": "block-ap"}, recipe, changes, []))
            published = [
                entry(("wikitext2",), "perplexity", perplexity, f"README of EfficientQAT ({PAPER})"),
                entry(FIVE, "acc", accuracy, f"README of EfficientQAT ({PAPER})"),
            ]
            changes = {"model.path": path, **second_phase(first)}
            changes["data"] = "{source: deita, num_samples: 2048, seq_len: 4096}"
            own = columns | {"method": "efficientqat"}
            cells.append(cell(f"{model}-{label(*grid)}", own, recipe, changes, published))
    return f"""\
# EfficientQAT's rows of Llama-3 Instruct: E2E-QP on conversations, answers learned.
#   qtool sweep tables/{table}
# {PAPER}. There the second phase reads 8192 conversations of at most 4096 tokens; here they are packed into 2048
# windows.
# A cell of method efficientqat starts from the checkpoint of the cell block-ap.

missing_models: skip
cells:
{"".join(cells)}"""


def alpaca() -> str:
    """Return EfficientQAT's table of MMLU after E2E-QP on Alpaca, with PEQA's rows."""
    cells, table = [], "efficientqat-alpaca"
    tuned = {
        "method.e2e": "{epochs: 3, batch_size: 16, optim: {accumulation: 1}}",
        "data": "{source: alpaca, num_samples: 4096, seq_len: 512}",
    }
    for grid, (own, peqa) in ALPACA.items():
        num_bits, group_size = grid
        recipe = f"papers/efficientqat/llama-2-7b-{label(num_bits, 64 if num_bits == 2 else 128)}"
        for (model, path), value, of_peqa in zip(LLAMA.items(), own, peqa, strict=True):
            columns, name = {"model": model, "grid": label(*grid)}, f"{model}-{label(*grid)}"
            common = {
                "model.path": path,
                "quant.group_size": str(group_size),
                "eval": "{tasks: [mmlu], num_fewshot: {mmlu: 5}}",
            }
            changes = common | {"method.e2e.steps": "0", "expected": "[]"}
            cells.append(cell(f"{name}-block-ap", columns | {"method": "block-ap"}, recipe, changes, []))
            chain = second_phase(f"{name}-block-ap")
            for method, each, start in (("efficientqat", value, chain), ("peqa", of_peqa, {"method.epochs": "0"})):
                published = [entry(("mmlu",), "acc", each, f"{PAPER}, MMLU after Alpaca")]
                changes = common | start | tuned
                cells.append(cell(f"{name}-{method}", columns | {"method": method}, recipe, changes, published))
    return f"""\
# EfficientQAT's table of MMLU with five examples, after E2E-QP of LLaMA on Alpaca.
#   qtool sweep tables/{table}
# {PAPER}. There the second phase takes 10,000 steps of 16 conversations, three times all of Alpaca; here
# conversations are packed into windows of 512 tokens, 4096 of them, and read three times.
# A cell of method efficientqat starts from the checkpoint of the cell block-ap.

missing_models: skip
cells:
{"".join(cells)}"""


def tables() -> dict[str, str]:
    """Return both tables, by the name of their file."""
    return {"efficientqat-instruct.yaml": instruct(), "efficientqat-alpaca.yaml": alpaca()}
