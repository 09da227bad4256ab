"""Help texts made from the recipe keys' descriptions, and shell completion; only they import pydantic."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

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


def _write_keys(formatter: Any, keys: "Sequence[Key]") -> None:
    for key in keys:
        default = f" [{key.default}]" if key.default else ""
        formatter.write(_wrapped(f"    {key.name}", key.description + default, formatter.width, 22))


def _wrapped(left: str, right: str, width: int, column: int) -> str:
    from textwrap import wrap

    lines = wrap(right, max(width - column, 20)) or [""]
    return "".join(f"{left if i == 0 else '':<{column - 1}} {line}".rstrip() + "\n" for i, line in enumerate(lines))


def recipe_names(incomplete: str) -> list[str]:
    """Packaged recipes, for the shell."""
    from qtool.config import files

    return [name for name in files.packaged() if name.startswith(incomplete)]


def table_names(incomplete: str) -> list[str]:
    """Packaged sweeps, for the shell."""
    from qtool.config import files

    return [name for name in files.tables() if name.startswith(incomplete)]


def format_names(incomplete: str) -> list[str]:
    """Export formats, for the shell."""
    from qtool.config import catalog

    return [name for name in catalog.export_formats() if name.startswith(incomplete)]
