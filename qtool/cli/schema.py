"""``qtool schema``: the JSON schemas of what users write and read."""

from typing import Annotated

import typer

from qtool.cli.output import print_json
from qtool.system.errors import InputError


def schema(
    of_sweep: Annotated[bool, typer.Option("--sweep", help="Print the schema of a sweep instead.")] = False,
    of_report: Annotated[bool, typer.Option("--report", help="Print the schema of report.json instead.")] = False,
) -> None:
    """Print the JSON schema of recipes, sweeps or report.json."""
    if of_sweep and of_report:
        raise InputError("--sweep and --report ask for two schemas; give one of them")
    if of_report:
        from qtool.reports.report import schema as described
    elif of_sweep:
        from qtool.sweeps.grid import schema as described
    else:
        from qtool.config.describe import schema as described
    print_json(described(), indent=2)
