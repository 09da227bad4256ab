"""``qtool recipes``: the packaged recipes and sweeps, as a list or one of them."""

import sys
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Annotated

import typer

from qtool.cli.arguments import Json
from qtool.cli.help import packaged_names
from qtool.cli.output import print_json, print_text
from qtool.system.errors import InputError, nearest

FOLDED = {  # folders whose files are listed only where they are asked for, and what they hold
    "papers/": "recipes of published results",
    "tables/": "sweeps, which qtool sweep runs",
}
MARK = " [offline]"
MEANING = "[offline]: needs no network: the built-in model, and text that it writes"


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|WORD",
            help="The recipe or sweep to print, or a word: list those that have it in name or description.",
            autocompletion=packaged_names,
        ),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="List the recipes of papers and the sweeps one by one.")] = False,
    as_json: Json = False,
) -> None:
    """List the packaged recipes and sweeps, or print one."""
    from qtool.config import files  # pydantic comes with it

    packaged = files.packaged() | files.tables()
    if name in packaged and not as_json:
        print_text(files.text_of(packaged[name]), end="")
        return
    listed = {each: files.summary(path) for each, path in packaged.items()}
    if name in packaged:
        listed = {name: listed[name]}
    elif name is not None:
        listed = {each: text for each, text in listed.items() if name.lower() in f"{each} {text}".lower()}
        if not listed:
            hint = nearest(name, packaged, "; the nearest is {}")
            raise InputError(f"no packaged recipe has {name} in its name or description{hint}; qtool recipes lists all")
    offline = {each for each in listed if files.runs_offline(packaged[each])}
    if as_json:
        print_json([_record(each, text, packaged[each], each in offline) for each, text in listed.items()], indent=2)
    else:
        folded = {} if all_ or name is not None else FOLDED
        marked = {each: f"{text}{MARK if each in offline else ''}" for each, text in listed.items()}
        lines = _lines(marked, folded, get_terminal_size().columns if sys.stdout.isatty() else None)
        print_text("\n".join([*lines, *(["", MEANING] if offline else [])]))


def _record(name: str, summary: str, path: Path, offline: bool) -> dict[str, str | bool]:
    """Return what ``--json`` says of a recipe."""
    kind = "sweep" if name.startswith("tables/") else "recipe"
    return {"name": name, "kind": kind, "description": summary, "path": str(path), "offline": offline}


def _lines(listed: dict[str, str], folded: dict[str, str], width: int | None) -> list[str]:
    """Return the list, wrapped to ``width`` columns (``None``: not wrapped), with a line for each of ``folded``."""
    shown = {name: text for name, text in listed.items() if not name.startswith(tuple(folded))}
    widths: dict[str, int] = {}  # folder -> length of the longest name in it
    for name in shown:
        folder = name.rpartition("/")[0]
        widths[folder] = max(widths.get(folder, 0), len(name))
    lines = []
    for name, text in shown.items():
        column = widths[name.rpartition("/")[0]] + 2
        if width is None:
            lines.append(f"{name:<{column}}{text}")
        elif width - column >= 40:
            first, *rest = wrap(text, width - column, break_on_hyphens=False)
            lines += [f"{name:<{column}}{first}", *(" " * column + line for line in rest)]
        else:
            lines += [name, *(f"    {line}" for line in wrap(text, width - 4, break_on_hyphens=False))]
    for prefix, what in folded.items():
        count = sum(name.startswith(prefix) for name in listed)
        lines += ["", f"{prefix}  {count} {what}; list them: qtool recipes {prefix}"]
    return lines
