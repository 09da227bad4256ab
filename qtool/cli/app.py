"""The command line: each command reads and checks what it was given, calls one function, and prints what came out.

Imported without torch, transformers or pydantic, so that ``--help`` and shell completion answer at once: whatever
needs them is imported inside the command, after the arguments are known. Results go to standard output, all else to
standard error. Exit codes: 0 done, 1 a run failed, 2 the user's input is wrong, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.cli import quantize
from qtool.cli.arguments import (
    Dtype,
    Folder,
    Json,
    MaxKl,
    MaxLoss,
    Overwrite,
    Quiet,
    is_recipe,
    path,
)
from qtool.cli.chat import chat
from qtool.cli.compare import compare
from qtool.cli.help import (
    DescribedCommand,
    SweepCommand,
    format_names,
    recipe_names,
    table_names,
    task_names,
)
from qtool.cli.output import check_gate, check_measured, fitted, print_either, print_text, show
from qtool.cli.plan import plan
from qtool.cli.push import Private, Repo, destination, push, pushed
from qtool.cli.recipes import recipes
from qtool.cli.schema import schema
from qtool.cli.session import running, starting
from qtool.cli.verify import verify
from qtool.system.errors import InputError
from qtool.system.version import __version__

if TYPE_CHECKING:
    from qtool.config.recipe import EvalRecipe

app = typer.Typer(
    name="qtool",
    help="Make large language models small: quantize, evaluate and export them.",
    epilog="Start with: qtool ptq quickstart",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(value: bool) -> None:
    if value:
        print_text(f"qtool {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


quantize.add_commands(app)
app.command()(plan)


@app.command("eval", cls=DescribedCommand)
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A model (folder, hub name, GGUF file) or a recipe; one with a method means the folder it writes.",
            autocompletion=recipe_names,
        ),
    ],
    tasks: Annotated[str | None, typer.Option("--tasks", metavar="A,B,...", autocompletion=task_names)] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N")] = None,
    batch_size: Annotated[str | None, typer.Option("--batch-size", metavar="N|auto")] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", metavar="N")] = None,
    context: Annotated[int | None, typer.Option("--context", metavar="N")] = None,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos")] = None,
    dtype: Dtype = None,
    device: Annotated[str | None, typer.Option("--device", metavar="NAME")] = None,
    backend: Annotated[str | None, typer.Option("--backend", metavar="NAME")] = None,
    max_loss: MaxLoss = None,
    max_kl: MaxKl = None,
    float_model: Annotated[
        str | None,
        typer.Option(
            "--float-model", metavar="PATH", help="The float model to compare with. Default: the one it was made from."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder for the report.", parser=path)
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, KL divergence and lm-eval tasks."""
    options: dict[str, dict[str, Any]] = {
        "model": {"dtype": dtype, "device": device},
        "eval": {
            "tasks": [task.strip() for task in tasks.split(",") if task.strip()] if tasks is not None else None,
            "limit": limit,
            "batch_size": batch_size,
            "num_fewshot": num_fewshot,
            "context": context,
            "bos": bos,
            "backend": backend,
        },
        "gate": {"max_loss": max_loss, "max_kl": max_kl},
    }
    with starting(quiet):
        checked = _evaluation(target, options)
        from qtool.pipelines import evaluate as pipeline
    where = output or (checked.output.path if checked.output else None)
    with running(quiet, where):
        outcome = pipeline.evaluate(
            checked.model,
            checked.eval,
            gate=checked.gate,
            float_model=float_model,
            output=where,
            seed=checked.seed,
            expected=checked.expected,
            plots=checked.output is not None and checked.output.plots,
        )
    show(outcome.report, as_json, outcome.path, outcome.exports, outcome.seconds)
    if (fault := check_gate(outcome) or check_measured(outcome)) is not None:
        raise fault


def _evaluation(target: str, options: dict[str, dict[str, Any]]) -> "EvalRecipe":
    """Return the evaluation of ``target``, a recipe or a model; the ``options`` given replace a recipe's keys."""
    from qtool.config.recipe import EvalRecipe, check, load_eval

    given = {name: {key: value for key, value in keys.items() if value is not None} for name, keys in options.items()}
    if is_recipe(target, "TARGET"):
        return load_eval(target, given)
    given["model"]["path"] = target
    return check(EvalRecipe, given, "the command line")


@app.command("export", cls=DescribedCommand)
def export(
    folder: Folder,
    format_: Annotated[str, typer.Option("--format", "-f", metavar="NAME", autocompletion=format_names)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write.", parser=path)],
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    repo: Repo = None,
    private: Private = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to the format of another engine."""
    from qtool.config.recipe import check_export

    entry = {"format": format_, "path": output, **({} if dtype is None else {"dtype": dtype})}
    config = check_export(entry)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one that qtool ptq wrote")
    with starting(quiet):
        from qtool.pipelines import export as pipeline
    with running(quiet, output):
        to = destination(repo, private)
        path = pipeline.export(folder, config, overwrite)
        address, fault = pushed(path, to)
    more = {} if to is None else {"pushed": address}
    print_either({"path": str(path), "format": config.format, **more}, str(path), as_json)
    if fault is not None:
        raise fault


@app.command("bench", cls=DescribedCommand)
def bench(
    folder: Folder,
    prompt_tokens: Annotated[int | None, typer.Option(min=2, metavar="N")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, metavar="N")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, metavar="N")] = None,
    dtype: Dtype = "bfloat16",
    device: Annotated[str, typer.Option("--device", metavar="NAME")] = "auto",
    backend: Annotated[str, typer.Option("--backend", metavar="NAME")] = "fast",
    into_report: Annotated[
        bool, typer.Option("--report", help="Put the result into the report in FOLDER, beside its quality.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure speed, memory and energy of a checkpoint."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one that qtool ptq wrote")
    from qtool.config.recipe import check
    from qtool.config.sweep import BenchConfig

    asked = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    given = {name: value for name, value in asked.items() if value is not None} | {"dtype": dtype, "backend": backend}
    options = check(BenchConfig, given, "the command line")
    with starting(quiet):
        from qtool.pipelines import bench as pipeline
    with running(quiet, None):
        report = pipeline.bench(folder, device, options, into_report)
    show(report, as_json, seconds=report.seconds)


app.command("chat")(chat)
app.command("push")(push)


@app.command("sweep", cls=SweepCommand)
def sweep(
    file: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP", help="A YAML file, or the name of a packaged table.", autocompletion=table_names
        ),
    ],
    set_: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a key of the sweep, or of the recipe of every cell; repeatable."
        ),
    ] = [],  # noqa: B006 (typer copies it)
    fresh: Annotated[bool, typer.Option("--fresh", help="Run every cell again, even those that are done.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            metavar="N",
            help="Cells at the same time. Default: one; on a cluster, all.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder of the sweep.", parser=path)
    ] = None,
    max_cells: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Refuse a sweep of more cells. Default: 1000.")
    ] = None,
    allow_launcher_commands: Annotated[
        bool,
        typer.Option("--allow-launcher-commands", help="Let launcher.parameters be any, also those that run commands."),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a recipe over a grid of keys, into one table."""
    from qtool.sweeps import grid

    checked = grid.load(
        file,
        set_,
        output,
        max_cells=max_cells or grid.MAX_CELLS,
        allow_launcher_commands=allow_launcher_commands,
    )
    with starting(quiet):
        from qtool.sweeps import runner
    with running(quiet, None):
        outcome = runner.sweep(checked, fresh=fresh, jobs=jobs)
    cells = {"ran": outcome.ran, "cached": outcome.cached, "failed": outcome.failed}
    show(outcome.report, as_json, outcome.path, seconds=outcome.seconds, more=cells)
    if outcome.failed:
        names = ", ".join(outcome.failed)
        print(
            f"error: {len(outcome.failed)} cell(s) failed, and the same command runs them again: {names}",
            file=sys.stderr,
        )
        raise typer.Exit(1)


app.command()(compare)
app.command()(verify)


@app.command()
def reproduce(folder: Folder, quiet: Quiet = False, as_json: Json = False) -> None:
    """Make a checkpoint again, and compare every tensor."""
    with starting(quiet):
        from qtool.pipelines import reproduce as pipeline
    with running(quiet, None):
        changes = pipeline.reproduce(folder)
    found = {"path": str(folder), "same": True, "changes": changes}
    print_either(found, f"{folder}: made again, the same bytes", as_json)


app.command()(recipes)


app.command()(schema)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices and data, and what is wrong."""
    from qtool.cli import doctor as examination

    found = examination.doctor()
    print_either(found, fitted(examination.render(found), sys.stdout), as_json, indent=2)
    if found["problems"]:
        raise typer.Exit(1)
