"""The commands that usually follow a run, as a terminal shows them below its result."""

import shlex
from collections.abc import Sequence
from pathlib import Path

FORMAT = "compressed-tensors"  # which vLLM and transformers read


def next_steps(path: Path, measured: bool, exports: Sequence[Path]) -> list[str]:
    """Return lines with the page of a run and the commands to measure, export, time and try its checkpoint."""
    folder = shlex.quote(str(path))
    page = path / "report.html"
    commands = [f"qtool eval {folder} --tasks wikitext2,kl"] if not measured else []
    if not exports:
        commands.append(f"qtool export {folder} -f {FORMAT} -o {shlex.quote(f'{path}-{FORMAT}')}")
    commands += [f"qtool bench {folder}", f"qtool chat {folder}"]
    return [
        *([f"report: {page}"] if page.exists() else []),
        *(f"{'next:' if index == 0 else '':<7} {command}" for index, command in enumerate(commands)),
    ]
