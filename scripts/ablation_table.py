"""EfficientQAT's ablations on Llama-2 7B, as a sweep; ``make_paper_tables.py`` writes the file."""

from make_paper_recipes import FIVE
from table_cells import cell, entry

WIKITEXT, C4 = ("wikitext2",), ("c4",)
TABLE = "efficientqat-ablation"
SOURCE = "arXiv 2407.11062, ablations"
BLOCKS = {"method.e2e.steps": "0"}  # the first phase alone

# variant at w2g64 -> changes, mean of both perplexities, mean accuracy in per cent
PARTS: dict[str, tuple[dict[str, str], float, float]] = {
    "rtn": ({"method": "{name: rtn}"}, 453.49, 40.69),
    "block-ap": (BLOCKS, 8.53, 58.99),
    "e2e-qp": ({"method.epochs": "0"}, 9.33, 55.71),
    "both": ({}, 7.68, 60.14),
    "block-ap-grid": (BLOCKS | {"method.trains": "[scales, zero_points]"}, 10.26, 55.20),
    "block-ap-weights": (BLOCKS | {"method.trains": "[weights]"}, 14.32, 46.50),
    "both-zero-points": ({"method.e2e.trains": "[zero_points]"}, 7.69, 60.08),
    "both-scales-and-zero-points": ({"method.e2e.trains": "[scales, zero_points]"}, 7.68, 60.18),
}
# group size at 2 bits, or windows of the second phase -> mean of both perplexities, mean accuracy in per cent
GROUPS = {32: (7.59, 60.28), 128: (7.99, 59.50), 256: (8.18, 58.67)}
WINDOWS = {
    **{128: (8.09, 59.03), 512: (7.88, 59.81), 2048: (7.75, 60.13), 4096: (7.68, 60.14)},
    **{8192: (7.63, 60.19), 32764: (7.50, 60.31)},
}
# grid, calibration text -> perplexity on WikiText-2, on C4, mean accuracy in per cent; of Block-AP alone
TEXTS = {
    ("w3g128", "wikitext2"): (5.72, 7.52, 63.24),
    ("w3g128", "c4"): (5.92, 7.38, 63.82),
    ("w3g128", "redpajama"): (5.91, 7.41, 63.50),
    ("w2g64", "wikitext2"): (6.73, 9.89, 58.26),
    ("w2g64", "c4"): (7.87, 9.30, 59.24),
    ("w2g64", "redpajama"): (7.70, 9.36, 58.99),
}
FEW = "1024"  # windows of 2048 tokens: the training split of WikiText-2 has no more than about 1200


def made(name: str, grid: str, changes: dict[str, str], *published: str) -> str:
    """Return a cell of Llama-2 7B on a grid."""
    return cell(name, {"variant": name}, f"papers/efficientqat/llama-2-7b-{grid}", changes, [*published])


def means(perplexity: float, accuracy: float) -> tuple[str, str]:
    """Return the published numbers of a cell, of which the perplexity is a mean."""
    return entry((*WIKITEXT, *C4), "perplexity", perplexity, SOURCE), entry(FIVE, "acc", accuracy, SOURCE)


def table() -> str:
    """Return the ablations, as far as recipe keys can express them."""
    cells = [made(name, "w2g64", changes, *means(*numbers)) for name, (changes, *numbers) in PARTS.items()]
    for size, numbers in GROUPS.items():
        cells.append(made(f"group-{size}", "w2g64", {"quant.group_size": str(size)}, *means(*numbers)))
    start = {"start": "block-ap", "method.epochs": "0"}
    for count, numbers in WINDOWS.items():
        changes = start | {"data": f"{{num_samples: {count}, seq_len: 4096}}"}
        cells.append(made(f"e2e-windows-{count}", "w2g64", changes, *means(*numbers)))
    for (grid, text), (wiki, c4, accuracy) in TEXTS.items():
        changes = BLOCKS | ({"data.source": text} if text != "redpajama" else {})
        changes |= {"data.num_samples": FEW} if text == "wikitext2" else {}
        each = (entry(WIKITEXT, "perplexity", wiki, SOURCE), entry(C4, "perplexity", c4, SOURCE))
        cells.append(made(f"text-{text}-{grid}", grid, changes, *each, entry(FIVE, "acc", accuracy, SOURCE)))
    return f"""\
# EfficientQAT's ablations on Llama-2 7B: phases, what trains, group size, windows, text.
#   qtool sweep tables/{TABLE}
# arXiv 2407.11062. Its perplexity is the mean of those on WikiText-2 and C4. The cells e2e-windows-* start from the
# checkpoint of the cell block-ap, as the paper's second phase has windows of its own, of 4096 tokens. WikiText-2 has
# fewer windows than other texts.

missing_models: skip
cells:
{"".join(cells)}"""
