"""The YAML of cells of the papers' tables, for ``make_paper_tables.py`` and ``tuned_tables.py``."""


def entry(tasks: tuple[str, ...], metric: str, value: float, source: str) -> str:
    """Return a published number as one line of YAML; accuracies are given in per cent and written as shares."""
    written = f"{value / 100:.4f}" if metric.startswith("acc") else f"{value:g}"
    return f"      - {{tasks: [{', '.join(tasks)}], metric: {metric}, value: {written}, source: '{source}'}}\n"


def cell(name: str, columns: dict[str, str], recipe: str, changes: dict[str, str], published: list[str]) -> str:
    """Return one cell; ``published`` replaces the recipe's own numbers, if it is not empty."""
    shown = ", ".join(f"{key}: {value}" for key, value in columns.items())
    lines = [f"  {name}:\n    columns: {{{shown}}}\n    recipe: {recipe}\n"]
    lines += [f"    {key}:{' ' if not value.startswith(chr(10)) else ''}{value}\n" for key, value in changes.items()]
    return "".join([*lines, *(["    expected:\n", *published] if published else [])])
