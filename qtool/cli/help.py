"""Help texts made from the recipe keys' descriptions, and shell completion; only they import pydantic."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from qtool.cli.output import print_text
from qtool.system.errors import InputError, nearest

if TYPE_CHECKING:
    from qtool.config.describe import Key


class DescribedCommand(TyperCommand):
    """A command whose options are described by the recipe keys that they set."""

    def format_options(self, ctx: Any, formatter: Any) -> None:  # Any: typer keeps these types private
        """Fill in the descriptions, then write the options as typer does."""
        from qtool.config import catalog, describe
        from qtool.config.gate import GateConfig
        from qtool.config.section import Section
        from qtool.config.sections import EvalConfig, ExportConfig, ModelConfig, OutputConfig
        from qtool.config.sweep import BenchConfig

        sections: dict[str, tuple[type[Section], ...]] = {
            "eval": (EvalConfig, ModelConfig, GateConfig),
            "bench": (BenchConfig, ModelConfig),
        }
        of_command = sections.get(str(self.name), (ExportConfig, OutputConfig, GateConfig))
        fields = {name: field for section in of_command for name, field in section.model_fields.items()}
        for param in self.params:
            field = fields.get(str(param.name).rstrip("_"))
            if field is not None and not getattr(param, "help", None):
                given = f" Default: {field.default}." if param.default is None and self.name == "bench" else ""
                param.help = describe.describe(field) + given  # type: ignore[attr-defined] # both kinds have it
                if param.name == "format_":
                    param.help = f"One of: {', '.join(catalog.export_formats())}."  # type: ignore[attr-defined]
        super().format_options(ctx, formatter)


class RecipeCommand(DescribedCommand):
    """A command that runs a recipe; its help ends with the recipe's keys."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write every key with its default and description, by section."""
        from qtool.config import describe

        formatter.write_paragraph()
        formatter.write_text("Recipe keys, in the file or as --set section.key=value:")
        for section, (text, keys) in describe.keys(self.name).items():
            formatter.write_paragraph()
            formatter.write(_wrapped(f"  {section or '(top level)'}", f"{text}", formatter.width, 22))
            _write_keys(formatter, keys)
        formatter.write_paragraph()
        formatter.write_text(
            "Values are YAML. A list entry is named by its number: --set export.0.path=out. In quant.overrides the "
            "text between 'overrides.' and the last key is the pattern of linear names: "
            "--set 'quant.overrides.*.mlp.down_proj.num_bits=8'. In quant.budget.floors and quant.budget.pins all that "
            "follows is the pattern: --set 'quant.budget.floors.*.mlp.down_proj=3'."
        )


class QuantizeCommand(DescribedCommand):
    """``qtool quantize``; its help ends with the methods."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write each method in a line, and where their keys are."""
        from qtool.config import catalog

        formatter.write_paragraph()
        formatter.write_text("Methods:")
        for method in catalog.methods():
            command, line = catalog.described(method)
            formatter.write(_wrapped(f"  {method}", f"{line} (qtool {command})", formatter.width, 18))
        formatter.write_paragraph()
        formatter.write_text(
            "qtool quantize --help-method NAME shows the keys of a method, qtool ptq --help those of all sections. "
            "Without a recipe nothing is evaluated or exported, unless --set says so: --set eval.tasks=[wikitext2,kl]."
        )


class SweepCommand(TyperCommand):
    """``qtool sweep``; its help ends with the keys of a sweep."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write every key with its default and description."""
        from qtool.sweeps import grid

        formatter.write_paragraph()
        formatter.write_text(
            "Keys of a sweep, in the file or as --set key=value (--set section.key is for every cell):"
        )
        _write_keys(formatter, grid.keys())


def print_method(ctx: Any, method: str | None) -> None:
    """Print the keys of ``method`` and end the command; ``None``: do nothing.

    Raises:
        InputError: there is no such method.
    """
    if method is None or ctx.resilient_parsing:  # the shell completes a line
        return
    from qtool.config import catalog, describe, plugins

    if method not in catalog.methods():
        hint = nearest(method, catalog.methods(), "the nearest is {}; ")
        raise InputError(f"--help-method: no method {method}; {hint}known: {', '.join(catalog.methods())}")
    plugin = plugins.get(method)
    formatter = ctx.make_formatter()
    formatter.write_text(f"{method}: {plugin.summary}. It runs as: qtool {plugin.command}, or qtool quantize.")
    formatter.write_paragraph()
    keys = [key for key in describe.keys_of(plugin.config) if key.name != "name"]
    sections: dict[str, list[str]] = {}
    for key in keys:
        section, _, name = key.name.rpartition(".")
        sections.setdefault(section, []).append(name)
    if keys:
        formatter.write_text("Keys, in section method of a recipe or as --set method.key=value:")
        _write_keys(formatter, [key for key in keys if "." not in key.name])
        for section, names in sections.items():
            if section:
                formatter.write(_wrapped(f"    {section}.", ", ".join(names), formatter.width, 22))
        if len(sections) > 1:
            formatter.write_paragraph()
            formatter.write_text(f"qtool {plugin.command} --help describes all of them.")
    else:
        formatter.write_text("It has no keys of its own.")
    print_text(formatter.getvalue(), end="")
    ctx.exit()


def _write_keys(formatter: Any, keys: "Sequence[Key]") -> None:
    for key in keys:
        default = f" [{key.default}]" if key.default else ""
        formatter.write(_wrapped(f"    {key.name}", key.description + default, formatter.width, 22))


def _wrapped(left: str, right: str, width: int, column: int) -> str:
    """Return ``right`` wrapped from ``column`` on, beside ``left``, or below it where ``left`` is too long."""
    from textwrap import wrap

    lines = wrap(right, max(width - column, 20), break_on_hyphens=False) or [""]
    if len(left) >= column:
        return "".join(line.rstrip() + "\n" for line in (left, *(f"{'':<{column}}{each}" for each in lines)))
    return "".join(f"{left if i == 0 else '':<{column - 1}} {line}".rstrip() + "\n" for i, line in enumerate(lines))


def method_names(incomplete: str) -> list[str]:
    """Methods, for the shell."""
    from qtool.config import catalog

    return [name for name in catalog.methods() if name.startswith(incomplete)]


def key_names(ctx: Any, incomplete: str) -> list[str]:
    """Keys of a recipe as ``key=``, for the shell; keys of a method where the command line names it or a recipe."""
    from qtool.config import describe

    if "=" in incomplete:
        return []
    found = [f"{key}=" for key in describe.shared_keys()]
    if incomplete.startswith("method."):
        method = ctx.params.get("method") or _method_of(next(iter(ctx.args), ""))  # the arguments before the option
        found += [] if method is None else [f"method.{key}=" for key in describe.method_keys(method)]
    return [key for key in found if key.startswith(incomplete)]


def _method_of(recipe: str) -> str | None:
    """Return the method of a recipe, or ``None`` if it cannot be read."""
    from qtool.config import catalog, files

    try:
        section = files.read_yaml(recipe).get("method")
    except InputError:
        return None
    name = section.get("name") if isinstance(section, dict) else None
    return name if name in catalog.methods() else None


def task_names(incomplete: str) -> list[str]:
    """Tasks that need no look-up, for the shell; of ``incomplete``, a list with commas, the last task is completed."""
    from qtool.config.sections import LM_EVAL_TASKS, METRICS

    before, comma, last = incomplete.rpartition(",")
    chosen = before.split(",")
    known = [task for task in (*METRICS, *LM_EVAL_TASKS) if task not in chosen]
    return [f"{before}{comma}{task}" for task in known if task.startswith(last)]


def recipe_names(incomplete: str) -> list[str]:
    """Packaged recipes, for the shell."""
    from qtool.config import files

    return [name for name in files.packaged() if name.startswith(incomplete)]


def packaged_names(incomplete: str) -> list[str]:
    """Packaged recipes and sweeps, for the shell."""
    return [*recipe_names(incomplete), *table_names(incomplete)]


def table_names(incomplete: str) -> list[str]:
    """Packaged sweeps, for the shell."""
    from qtool.config import files

    return [name for name in files.tables() if name.startswith(incomplete)]


def format_names(incomplete: str) -> list[str]:
    """Export formats, for the shell."""
    from qtool.config import catalog

    return [name for name in catalog.export_formats() if name.startswith(incomplete)]
