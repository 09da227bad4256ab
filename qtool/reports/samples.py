"""Text that the evaluated model and its float model write after the same prompts, as a report shows it."""

from collections.abc import Sequence

from qtool.reports.document import Table
from qtool.reports.records import Continuation


def table(continuations: Sequence[Continuation]) -> Table | None:
    """Return the table with a row for each prompt; ``None`` if there is no text."""
    if not continuations:
        return None
    if all(each.float_text is None for each in continuations):
        rows = [[each.prompt, each.text] for each in continuations]
        return Table(["prompt", "text"], rows, "ll", title="What it writes")
    rows = [[each.prompt, each.float_text or "", each.text] for each in continuations]
    return Table(["prompt", "float", "quantized"], rows, "lll", title="What both models write")


def same(each: Continuation) -> str:
    """Return in a sentence how many first tokens of a text are those of the float model."""
    if not each.num_same:
        return "The first token is another than the float model's"
    if each.num_same == each.num_tokens:
        return f"All {each.num_tokens} tokens are those of the float model"
    first = "token is that" if each.num_same == 1 else f"{each.num_same} of {each.num_tokens} tokens are those"
    return f"The first {first} of the float model"


def agreement(continuations: Sequence[Continuation]) -> str:
    """Return how many first tokens are those of the float model; empty if there is nothing to compare."""
    counts = [f"{each.num_same} of {each.num_tokens}" for each in continuations if each.num_same is not None]
    return f"the first {', '.join(counts)} tokens after {len(counts)} prompts" if counts else ""
