"""The recipe: YAML and ``--set`` overrides to one checked, frozen ``Recipe``, or every fault at once.

Reading a recipe imports one method file, the one that ``method.name`` asks for (its section is defined there);
importing this module imports none.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from qtool.config import plugins, validation
from qtool.config.files import read_yaml
from qtool.config.overrides import overridden
from qtool.config.quant import QuantConfig
from qtool.config.sections import (
    DataConfig,
    EvalConfig,
    ExpectedConfig,
    ExportConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    Section,
)
from qtool.system.errors import InputError, listing

S = TypeVar("S", bound=Section)


def _unknown(key: str, found: str, what: str, known: Sequence[str]) -> InitErrorDetails:
    nearest = get_close_matches(found, known, n=1)
    hint = f"the nearest is {nearest[0]}; " if nearest else ""
    message = f"no such {what}; {hint}known: {', '.join(known) or 'none'}"
    kind = PydanticCustomError("unknown_name", "{message}", {"message": message})
    return InitErrorDetails(type=kind, loc=(key,), input=found)


def _method_section(value: object) -> object:
    """Check a method's section with the config class of its own file."""
    if not isinstance(value, Mapping):
        return value
    name = value.get("name")
    if not isinstance(name, str):  # the keys of a section depend on its method: without one, only that is said
        return MethodConfig.model_validate({"name": name} if "name" in value else {})
    if name not in plugins.names():
        raise ValidationError.from_exception_data("method", [_unknown("name", name, "method", plugins.names())])
    return plugins.get(name).config.model_validate(value)


def _export_section(value: object) -> object:
    """Check that the format exists, together with the other keys of the entry."""
    if not isinstance(value, Mapping) or not isinstance(value.get("format"), str):
        return value
    value = {**value, "format": value["format"].replace("_", "-")}
    if value["format"] in plugins.export_formats():
        return value
    wrong = [_unknown("format", value["format"], "export format", plugins.export_formats())]
    try:
        ExportConfig.model_validate(value)
    except ValidationError as error:
        for row in error.errors():
            wrong.append(InitErrorDetails(type=row["type"], loc=row["loc"], input=row["input"], ctx=row.get("ctx", {})))
    raise ValidationError.from_exception_data("export", wrong)


Export = Annotated[ExportConfig, BeforeValidator(_export_section)]


class Recipe(Section):
    """A whole quantization run."""

    model: ModelConfig = Field(description="Which model, in which precision, where.")
    method: Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_method_section)] = Field(
        description="How to quantize: the method's name, and keys of its own."
    )
    quant: QuantConfig = Field(default_factory=QuantConfig, description="The grid of the weights.")
    data: DataConfig = Field(default_factory=DataConfig, description="Calibration text.")
    eval: EvalConfig | None = Field(None, description="What to measure afterwards; left out: nothing.")
    export: tuple[Export, ...] = Field((), description="A list of exports to write afterwards.")
    expected: tuple[ExpectedConfig, ...] = Field((), description="Published numbers, to print ours beside them.")
    output: OutputConfig = Field(description="Where the checkpoint goes.")
    seed: int = Field(0, ge=0, description="Of everything random: same recipe, same machine, same bits.")

    @model_validator(mode="after")
    def _fill_data(self) -> "Recipe":
        """A copy with the method's own defaults in the data section, where the recipe sets nothing else."""
        own = {key: value for key, value in self.method.data_defaults.items() if key not in self.data.model_fields_set}
        return self.model_copy(update={"data": self.data.model_copy(update=own)}) if own else self


class EvalRecipe(Section):
    """An evaluation alone: the recipe of ``qtool eval``, without a ``method`` section."""

    model: ModelConfig = Field(description="Which model, in which precision, where.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="What to measure.")
    expected: tuple[ExpectedConfig, ...] = Field((), description="Published numbers, to print ours beside them.")
    output: OutputConfig | None = Field(None, description="Where the report goes; left out: only printed.")
    seed: int = Field(0, ge=0, description="Of everything random.")


def check(kind: type[S], raw: Mapping[str, object], source: str | Path, wrong: Sequence[str] = ()) -> S:
    """``raw`` as a ``kind``; ``source`` names it in messages, ``wrong`` are faults that were already found.

    Raises:
        InputError: With every fault on a line of its own: dotted key, what is wrong, and the value found.
    """
    checked, found = examine(kind, raw)
    lines = [*wrong, *found]
    if checked is None or lines:
        raise InputError(listing(f"{source} has {len(lines)} fault(s):", lines))
    return checked


def examine(kind: type[S], raw: Mapping[str, object]) -> tuple[S | None, list[str]]:
    """``raw`` as a ``kind``, or ``None`` and a line for each of its faults."""
    try:
        return kind.model_validate(raw), []
    except ValidationError as error:
        return None, validation.explain(kind, raw, error)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at ``path`` (a file, or the name of a packaged one) with ``--set`` overrides applied.

    Raises:
        InputError: The file cannot be read, or the recipe has faults; the message lists all of them.
    """
    raw, wrong = overridden(read_yaml(path), overrides)
    return check(Recipe, _with_plan(raw), f"{path} with --set" if overrides else path, wrong)


def load_eval(path: str | Path, options: Mapping[str, Mapping[str, object]]) -> EvalRecipe:
    """What ``qtool eval`` measures for a recipe; ``options`` are keys by section that replace the recipe's.

    For a recipe with a ``method`` section that is the checkpoint it writes.

    Raises:
        InputError: The recipe has faults, or its checkpoint is not there yet.
    """
    raw = read_yaml(path)
    for section, values in options.items():
        base = raw.get(section) or {}
        if values and isinstance(base, dict):
            raw[section] = {**base, **values}
    if "method" not in raw:
        return check(EvalRecipe, raw, path)
    recipe = check(Recipe, _with_plan(raw), path)
    if not recipe.output.path.is_dir():
        command = plugins.get(recipe.method.name).command
        raise InputError(f"{path} writes {recipe.output.path}, which is not there yet; run: qtool {command} {path}")
    model = recipe.model.model_copy(update={"path": str(recipe.output.path)})
    return EvalRecipe(model=model, eval=recipe.eval or EvalConfig(), expected=recipe.expected, seed=recipe.seed)


def _with_plan(raw: dict[str, Any]) -> dict[str, Any]:
    """``raw`` with the overrides of the file that ``quant.overrides`` names, where it names one."""
    quant = raw.get("quant")
    if not isinstance(quant, dict) or not isinstance(quant.get("overrides"), str):
        return raw
    planned = read_yaml(quant["overrides"]).get("quant")
    overrides = planned.get("overrides") if isinstance(planned, dict) else None
    if not isinstance(overrides, dict):
        raise InputError(f"quant.overrides: {quant['overrides']} has no overrides in a section quant")
    return {**raw, "quant": {**quant, "overrides": overrides}}


class _OneExport(Section):
    export: Export


def check_export(values: Mapping[str, object]) -> ExportConfig:
    """The export that the options of ``qtool export`` ask for.

    Raises:
        InputError: With every fault on a line of its own.
    """
    return check(_OneExport, {"export": values}, "the command line").export


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default filled in; ``Recipe.model_validate`` reads it back."""
    data = recipe.model_dump(mode="json")
    # an override's defaults are not choices: filled in, they would replace the section's own values
    data["quant"]["overrides"] = {
        pattern: override.model_dump(mode="json", exclude_unset=True)
        for pattern, override in recipe.quant.overrides.items()
    }
    return data
