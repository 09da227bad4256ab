"""``qtool compare``: runs side by side."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.arguments import Json, path
from qtool.cli.output import print_json, print_text, show_table


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders with a report.json, or such files. What has no report is named and left out.",
            parser=path,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Folder for the page, its table and figures.", parser=path),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show runs side by side, and the best for their size."""
    from qtool.reports import compared_paths

    found = compared_paths.compare(runs)
    if output is not None:
        found.write(output)
    if as_json:
        for line in found.left_out:
            print(f"note: {line}", file=sys.stderr)
        print_json({"path": str(output) if output else None, **found.as_dict()})
    else:
        show_table(found)
        if output is not None:
            print_text(f"\n{output}")
