"""Arguments and options that several commands share, and the reading of paths."""

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.help import key_names, method_names, print_method, recipe_names
from qtool.system import paths


def path(text: str) -> Path:
    """Return the path that an argument means, with ``~`` and variables expanded as in recipes."""
    try:
        return paths.expanded(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}") from None


def is_recipe(target: str, argument: str) -> bool:
    """Return whether ``target``, the value of ``argument``, is a recipe and not a model (folder, name or GGUF file).

    Raises:
        InputError: ``target`` is no path.
    """
    from qtool.config import files

    return files.is_recipe(target, argument)


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a packaged recipe.", autocompletion=recipe_names
    ),
]
Set = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one key of the recipe; repeatable.", autocompletion=key_names
    ),
]
HelpMethod = Annotated[
    str | None,
    typer.Option(
        "--help-method",
        metavar="NAME",
        help="Show the keys of one method and exit.",
        is_eager=True,
        callback=print_method,
        autocompletion=method_names,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete what an unfinished run left, and start over.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only notes on what is written.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, also for errors.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that qtool wrote.", parser=path)]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="NAME")]
MaxLoss = Annotated[str | None, typer.Option("--max-loss", metavar="PERCENT")]
MaxKl = Annotated[str | None, typer.Option("--max-kl", metavar="NATS")]
