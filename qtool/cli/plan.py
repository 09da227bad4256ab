"""``qtool plan``: what a run will make and take, or which grids of a model fit, before anything is quantized."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.cli.arguments import Json, Quiet, Set, is_recipe, path
from qtool.cli.help import recipe_names
from qtool.cli.output import print_either, print_json, print_text, show_table
from qtool.cli.session import running, starting
from qtool.system.errors import InputError

if TYPE_CHECKING:
    from qtool.config.recipe import Recipe
    from qtool.reports.forecast import Forecast


def plan(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe, or a model: a folder or a hub name, of which config.json is enough, or a GGUF file.",
            autocompletion=recipe_names,
        ),
    ],
    set_: Set = [],  # noqa: B006 (typer copies it)
    engine: Annotated[
        str | None,
        typer.Option("--target", metavar="NAME", help="Engine that will load the result; the recipe's target."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Memory that will serve the model, e.g. 24GB: which grids fit."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", metavar="N", min=1, help="Tokens whose keys and values are in it too. Default: 4096."
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Measure time and memory on one block, for up to a minute.")
    ] = True,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep time and memory in OUTPUT.plan.json, for the report of the run.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="YAML file of a budget's bits, for quant.overrides.", parser=path
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what a run makes and takes, and which engines load it."""
    num_bytes = None if memory is None else _num_bytes(memory)
    context = 4096 if context is None and memory is not None else context
    if not is_recipe(what, "RECIPE|MODEL"):
        _of_model(what, set_, output, engine, num_bytes, context, quiet, as_json)
        return
    from qtool.config.recipe import load

    with starting(quiet):
        recipe = load(what, [*set_, *([] if engine is None else [f"target={engine}"])])
    if recipe.quant.budget is not None:
        _of_budget(recipe, output, overwrite, quiet, as_json)
        return
    if output is not None:
        raise InputError("--output writes the bits of a budget, and the recipe has no quant.budget")
    with starting(quiet):
        from qtool.pipelines import forecast
    with running(quiet, None):
        found = forecast.of_recipe(recipe, probed=probe, memory=num_bytes, context=context)
        if keep:
            from qtool.pipelines import kept_forecast

            kept_forecast.keep(recipe, found)
    _show(found, as_json)


def _num_bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise InputError(f"--memory: {text!r} is no size; write for example 24GB or 16GiB") from None


def _of_model(
    path: str,
    set_: list[str],
    output: Path | None,
    engine: str | None,
    memory: int | None,
    context: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    from qtool.config.recipe import check
    from qtool.config.sections import ModelConfig
    from qtool.config.target import TargetConfig

    if set_ or output is not None:
        raise InputError(f"{path} is a model, and --set and --output are for recipes")
    config = check(ModelConfig, {"path": path}, "the command line")
    target: TargetConfig | None = None
    if engine is not None:
        target = check(TargetConfig, {"engine": engine}, "--target")
    with starting(quiet):
        from qtool.pipelines import forecast
    with running(quiet, None):
        found = forecast.of_model(config, engine=target, memory=memory, context=context)
    _show(found, as_json)


def _show(found: "Forecast", as_json: bool) -> None:
    """Print a forecast; exit with 2 if the target does not load the result."""
    if as_json:
        print_json(found.plain(), indent=2)
    else:
        show_table(found)
    if found.refused is not None:
        raise typer.Exit(2)


def _of_budget(recipe: "Recipe", output: Path | None, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Choose the bits of each unit for the recipe's budget; print them, and write them as a file."""
    if output is not None and not output.absolute().parent.is_dir():
        raise InputError(f"{output} cannot be written: {output.absolute().parent} is no folder")
    if output is not None and output.exists() and not overwrite:
        raise InputError(f"{output} exists; choose another file, or pass --overwrite to replace it")
    with starting(quiet):
        from qtool.pipelines import forecast
        from qtool.pipelines import plan as pipeline
    with running(quiet, None):
        found = pipeline.plan(recipe)
        shown: Any = None if as_json else forecast.of_budget(recipe, found)
    if output is not None:
        from qtool.system.writing import write_text

        write_text(output, found.yaml(recipe.quant))
    text = found.table() + (f"\n\n{output}" if output is not None else "")
    print_either(found.model_dump(mode="json"), text, as_json, indent=2)
    if shown is not None:
        print_text("")
        show_table(shown)
