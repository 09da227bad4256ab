"""``qtool quantize`` and the commands of methods.

``quantize`` takes a recipe or a model, and runs any method; ``ptq`` and its like take recipes of their own methods.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.cli.arguments import (
    Fresh,
    HelpMethod,
    Json,
    MaxKl,
    MaxLoss,
    Overwrite,
    Quiet,
    RecipeArgument,
    Set,
    is_recipe,
    path,
)
from qtool.cli.help import QuantizeCommand, RecipeCommand, method_names, recipe_names
from qtool.cli.next_steps import next_steps
from qtool.cli.output import check_gate, show
from qtool.cli.push import Private, Repo, destination, pushed
from qtool.cli.session import running, starting
from qtool.config import catalog
from qtool.system import distributed
from qtool.system.errors import InputError

if TYPE_CHECKING:
    from qtool.config.recipe import Recipe

SUMMARIES = {  # help texts of the commands that run methods, in their order on the screen
    "ptq": "Quantize a model without training it.",
    "qat": "Quantize a model while training it.",
    "efficientqat": "EfficientQAT: train block by block, then all scales.",
    "lrqat": "LR-QAT: train low-rank adapters inside the rounding.",
}

What = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|MODEL",
        help="A recipe, or a model: a folder, a hub name, builtin:wiki-llama-3m, or a GGUF file.",
        autocompletion=recipe_names,
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help=f"Method, listed below. Default: the recipe's; of a model, {catalog.ALONE_METHOD}.",
        autocompletion=method_names,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        "--bits", metavar="N", help=f"quant.num_bits. Default: the recipe's; of a model, {catalog.ALONE_BITS}."
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        metavar="N",
        help=f"quant.group_size. Default: the recipe's; of a model, {catalog.ALONE_GROUP_SIZE}.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="Folder of the checkpoint. Default: the recipe's; of a model, out/MODEL-METHOD-GRID.",
        parser=path,
    ),
]


def recipe_of(
    what: str, method: str | None, bits: int | None, group_size: int | None, output: Path | None, set_: Sequence[str]
) -> "Recipe":
    """Return the recipe of a run of ``qtool quantize``; the options replace the recipe's keys, and ``set_`` theirs.

    Raises:
        InputError: the recipe or the options have faults.
    """
    from qtool.config import recipe
    from qtool.config.keywords import start_of, with_folder
    from qtool.config.overrides import overridden
    from qtool.system.paths import path_text

    given: dict[str, Any] = {
        "method.name": method,
        "quant.num_bits": bits,
        "quant.group_size": group_size,
        "output.path": None if output is None else path_text(output),
    }
    options = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    if is_recipe(what, "RECIPE|MODEL"):
        return recipe.load(what, [*options, *set_])
    start = start_of(what, dict.fromkeys(text.partition("=")[0] for text in set_))
    raw, wrong = overridden(start, [*options, *set_])
    checked = recipe.written(raw, "the command line", wrong)
    named = output is not None or any(text.startswith(("output=", "output.path=")) for text in set_)
    return checked if named else with_folder(checked)


def add_commands(app: typer.Typer) -> None:
    """Add ``quantize``, and a command for each kind of method."""
    app.command("quantize", cls=QuantizeCommand)(quantize)
    for name in dict.fromkeys([*SUMMARIES, *sorted(catalog.commands())]):
        methods = ", ".join(catalog.commands()[name])
        _add_method_command(app, name, SUMMARIES.get(name, f"Quantize a model with {methods}."))


def _add_method_command(app: typer.Typer, name: str, summary: str) -> None:
    @app.command(name, cls=RecipeCommand, help=summary)
    def command(
        recipe: RecipeArgument,
        set_: Set = [],  # noqa: B006 (typer copies it)
        overwrite: Overwrite = False,
        fresh: Fresh = False,
        max_loss: MaxLoss = None,
        max_kl: MaxKl = None,
        repo: Repo = None,
        private: Private = False,
        help_method: HelpMethod = None,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        from qtool.config import plugins
        from qtool.config.recipe import load

        with starting(quiet):
            checked = load(recipe, _overrides(set_, overwrite, max_loss, max_kl))
        right = plugins.get(checked.method.name).command
        if right != name:
            raise InputError(f"method {checked.method.name} runs as: qtool {right}, not qtool {name}")
        _quantize(checked, fresh, repo, private, quiet, as_json)


def _overrides(set_: Sequence[str], overwrite: bool, max_loss: str | None, max_kl: str | None) -> list[str]:
    limits = {"gate.max_loss": max_loss, "gate.max_kl": max_kl}
    given = [f"{key}={value}" for key, value in limits.items() if value is not None]
    return [*set_, *(["output.overwrite=true"] if overwrite else []), *given]


def quantize(
    what: What,
    method: MethodName = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    output: Output = None,
    set_: Set = [],  # noqa: B006 (typer copies it)
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    max_loss: MaxLoss = None,
    max_kl: MaxKl = None,
    repo: Repo = None,
    private: Private = False,
    help_method: HelpMethod = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize a model by any method, with or without a recipe."""
    with starting(quiet):
        checked = recipe_of(what, method, bits, group_size, output, _overrides(set_, overwrite, max_loss, max_kl))
    _quantize(checked, fresh, repo, private, quiet, as_json)


def _quantize(recipe: "Recipe", fresh: bool, repo: str | None, private: bool, quiet: bool, as_json: bool) -> None:
    with starting(quiet or not distributed.is_first()):
        from qtool.pipelines import quantize as pipeline
    with running(quiet, recipe.output.path):
        to = destination(repo, private)
        outcome = pipeline.quantize(recipe, fresh)
        failed = check_gate(outcome, to)
        address, fault = (None, failed) if failed else pushed(recipe.output.path, to)
    if outcome is not None:  # else another of several processes shows it
        more = {} if to is None else {"pushed": address}
        assert outcome.path is not None
        then = next_steps(outcome.path, bool(outcome.report.results), outcome.exports)
        show(outcome.report, as_json, outcome.path, outcome.exports, outcome.seconds, more, then)
    if fault is not None:
        raise fault
