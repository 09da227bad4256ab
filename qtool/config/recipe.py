"""Read YAML and ``--set`` overrides as one checked, frozen ``Recipe``, or report every fault at once.

Reading a recipe imports the file of the method that ``method.name`` asks for, because the method's section is defined
there; importing this module imports no method.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from qtool.config import catalog, plugins, validation
from qtool.config.files import read_yaml
from qtool.config.gate import GateConfig
from qtool.config.grids import MIXED_GRIDS
from qtool.config.overrides import overridden
from qtool.config.quant import QuantConfig
from qtool.config.section import SEED_LIMIT, Section
from qtool.config.sections import (
    DataConfig,
    EvalConfig,
    ExpectedConfig,
    ExportConfig,
    GgufConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    TrackerConfig,
)
from qtool.config.target import TargetConfig
from qtool.system import paths
from qtool.system.errors import InputError, counted, listing, nearest

S = TypeVar("S", bound=Section)


def _unknown(key: str, found: str, what: str, known: Sequence[str]) -> InitErrorDetails:
    hint = nearest(found, known, "the nearest is {}; ")
    message = f"no such {what}; {hint}known: {', '.join(known) or 'none'}"
    kind = PydanticCustomError("unknown_name", "{message}", {"message": message})
    return InitErrorDetails(type=kind, loc=(key,), input=found)


def _method_section(value: object) -> object:
    """Check a method's section with the config class of its own file."""
    if not isinstance(value, Mapping):
        return value
    name = value.get("name")
    if not isinstance(name, str):  # without a method its keys are unknown: report only that
        return MethodConfig.model_validate({"name": name} if "name" in value else {})
    if name not in catalog.methods():
        raise ValidationError.from_exception_data("method", [_unknown("name", name, "method", catalog.methods())])
    return plugins.get(name).config.model_validate(value)


def _export_section(value: object) -> object:
    """Check the format's name together with the other keys of the entry, to report all their faults."""
    if not isinstance(value, Mapping) or not isinstance(value.get("format"), str):
        return value
    value = {**value, "format": value["format"].replace("_", "-")}
    if value["format"] in catalog.export_formats():
        return value
    wrong = [_unknown("format", value["format"], "export format", catalog.export_formats())]
    try:
        ExportConfig.model_validate(value)
    except ValidationError as error:
        for row in error.errors():
            wrong.append(InitErrorDetails(type=row["type"], loc=row["loc"], input=row["input"], ctx=row.get("ctx", {})))
    raise ValidationError.from_exception_data("export", wrong)


Export = Annotated[ExportConfig, BeforeValidator(_export_section)]


class Recipe(Section):
    """The recipe of a whole quantization run."""

    model: ModelConfig = Field(description="The model, the precision of computation, and the device.")
    method: Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_method_section)] = Field(
        description="The quantization method: its name, and keys of its own.",
    )
    quant: QuantConfig = Field(default_factory=QuantConfig, description="The grid of the quantized weights.")
    data: DataConfig = Field(default_factory=DataConfig, description="Calibration text.")
    eval: EvalConfig | None = Field(None, description="Evaluation after quantization; left out: none.")
    gate: GateConfig = Field(GateConfig(), description="The largest loss of quality that passes; left out: any.")
    target: TargetConfig | None = Field(
        None, description="The engine that will load the result; left out: no grid is refused for an engine's sake."
    )
    export: tuple[Export, ...] = Field((), description="A list of exports to write after quantization.")
    gguf: GgufConfig = Field(GgufConfig(), description="The mixture of grids for a GGUF file.")
    expected: tuple[ExpectedConfig, ...] = Field(
        (), description="Published numbers, which the report shows beside the measured ones."
    )
    output: OutputConfig = Field(description="The folder of the checkpoint, and options.")
    tracker: TrackerConfig = Field(TrackerConfig(), description="The experiment tracker; left out: none.")
    seed: int = Field(
        0,
        ge=0,
        lt=SEED_LIMIT,
        description="Seed of all random numbers: the same recipe on the same machine gives the same bits.",
    )

    @model_validator(mode="after")
    def _mixture_fits(self) -> "Recipe":
        if self.gguf.grid == "k_m" and self.quant.grid not in MIXED_GRIDS:
            raise ValueError(
                f"gguf.grid: k_m makes a mixture around a grid, and quant.grid is {self.quant.grid}; set quant.grid to "
                f"one of {', '.join(MIXED_GRIDS)}, or gguf.grid: keep"
            )
        if self.gguf.grid == "k_m" and self.model.free:
            raise ValueError("gguf.grid: k_m needs the model's class; with model.free, name grids in quant.overrides")
        return self

    @model_validator(mode="after")
    def _gate_is_measured(self) -> "Recipe":
        self.gate.check(self.eval)
        return self

    @model_validator(mode="after")
    def _signs_fit(self) -> "Recipe":
        grids = (self.quant, *self.quant.overrides.values())
        if self.method.positive_scales and any(grid.negative_scales for grid in grids):
            raise ValueError(
                f"method {self.method.name} computes scales from the largest weights, which makes them positive; leave "
                "out quant.negative_scales, or use another method, such as lsq"
            )
        return self

    @model_validator(mode="after")
    def _fill_data(self) -> "Recipe":
        """Return a copy with the method's own defaults for data keys that the recipe does not set."""
        own = {key: value for key, value in self.method.data_defaults.items() if key not in self.data.model_fields_set}
        return self.model_copy(update={"data": self.data.model_copy(update=own)}) if own else self


class EvalRecipe(Section):
    """The recipe of ``qtool eval`` alone, without a ``method`` section."""

    model: ModelConfig = Field(description="The model, the precision of computation, and the device.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="The tasks to evaluate, and their options.")
    gate: GateConfig = Field(GateConfig(), description="The largest loss of quality that passes; left out: any.")
    expected: tuple[ExpectedConfig, ...] = Field(
        (), description="Published numbers, which the report shows beside the measured ones."
    )
    output: OutputConfig | None = Field(None, description="The folder of the report; left out: it is only printed.")
    seed: int = Field(0, ge=0, lt=SEED_LIMIT, description="Seed of all random numbers.")

    @model_validator(mode="after")
    def _gate_is_measured(self) -> "EvalRecipe":
        self.gate.check(self.eval)
        return self


def check(kind: type[S], raw: Mapping[str, object], source: str | Path, wrong: Sequence[str] = ()) -> S:
    """Return ``raw`` as a ``kind``; ``source`` names it in messages, ``wrong`` are faults that were found before.

    Raises:
        InputError: The message has one line for each fault: dotted key, what is wrong, and the value found.
    """
    checked, found = examine(kind, raw)
    lines = [*wrong, *found]
    if checked is None or lines:
        raise InputError(listing(f"{source} has {counted(len(lines), 'fault')}:", lines))
    return checked


def examine(kind: type[S], raw: Mapping[str, object]) -> tuple[S | None, list[str]]:
    """Return ``raw`` as a ``kind`` (``None`` if it has faults) and one line for each fault."""
    try:
        return kind.model_validate(raw), []
    except ValidationError as error:
        return None, validation.explain(kind, raw, error)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe at ``path`` (a file, or the name of a packaged one) and apply ``--set`` overrides.

    Raises:
        InputError: The file cannot be read, or the recipe has faults; the message lists all of them.
    """
    raw, wrong = overridden(read_yaml(path), overrides)
    return written(raw, f"{path} with --set" if overrides else path, wrong)


def written(raw: dict[str, Any], source: str | Path, wrong: Sequence[str] = ()) -> Recipe:
    """Return the recipe of sections as a user wrote them, with only the keys that were given.

    Raises:
        InputError: as for :func:`check`, and for a budget beside the width that it chooses.
    """
    return check(Recipe, with_plan(raw), source, [*wrong, *_two_widths(raw)])


def _two_widths(raw: Mapping[str, object]) -> list[str]:
    """Return the fault of a recipe that gives both a budget and the width that the budget chooses."""
    quant = raw.get("quant")
    if not isinstance(quant, Mapping) or quant.get("budget") is None or quant.get("num_bits") is None:
        return []
    return [
        f"quant.num_bits: {validation.found(quant['num_bits'])} beside quant.budget, which chooses the bits of each "
        "linear; leave one of them out (--set quant.num_bits=null leaves out that of a recipe)"
    ]


def load_eval(path: str | Path, options: Mapping[str, Mapping[str, object]]) -> EvalRecipe:
    """Load what ``qtool eval`` measures for a recipe; ``options``, keys by section, replace the recipe's.

    For a recipe with a ``method`` section the model to measure is the checkpoint that the recipe writes.

    Raises:
        InputError: as for :func:`written`, or the recipe's checkpoint does not exist yet.
    """
    raw = read_yaml(path)
    for section, values in options.items():
        base = raw.get(section) or {}
        if values and isinstance(base, dict):
            raw[section] = {**base, **values}
    if "method" not in raw:
        return check(EvalRecipe, raw, path)
    recipe = written({**raw, "eval": raw.get("eval") or {}}, path)
    if not recipe.output.path.is_dir():
        command = plugins.get(recipe.method.name).command
        raise InputError(f"{path} writes {recipe.output.path}, which does not exist yet; run: qtool {command} {path}")
    model = recipe.model.model_copy(update={"path": paths.path_text(recipe.output.path), "free": False})
    return EvalRecipe(
        model=model,
        eval=recipe.eval or EvalConfig(),
        gate=recipe.gate,
        expected=recipe.expected,
        seed=recipe.seed,
    )


def with_plan(raw: dict[str, Any]) -> dict[str, Any]:
    """Return ``raw``; if ``quant.overrides`` names a file, the overrides of that file take its place.

    The grids of embedding and head that the file gives replace those of ``raw``.

    Raises:
        InputError: the file has no overrides, or gives a grid to a table that ``raw`` keeps in floating point.
    """
    quant = raw.get("quant")
    if not isinstance(quant, dict) or not isinstance(quant.get("overrides"), str):
        return raw
    section = read_yaml(quant["overrides"]).get("quant")
    planned = section if isinstance(section, dict) else {}
    overrides = planned.get("overrides")
    if not isinstance(overrides, dict):
        raise InputError(
            f"quant.overrides: {quant['overrides']} has no overrides in its section quant; give a file of qtool plan"
        )
    grids = {key: planned[key] for key in ("embedding", "head") if key in planned}
    for key, grid in grids.items():
        if quant.get(key) == "float" != grid:
            raise InputError(
                f"quant.{key} is float, and {quant['overrides']} gives it the grid {grid}; leave one of them out"
            )
    return {**raw, "quant": {**quant, "overrides": overrides, **grids}}


class _OneExport(Section):
    export: Export


def check_export(values: Mapping[str, object], source: str = "the command line") -> ExportConfig:
    """Check the options of an export, which ``source`` gave, and return them.

    Raises:
        InputError: The message has one line for each fault.
    """
    return check(_OneExport, {"export": values}, source).export


def as_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML: the keys that were given, without ``output.overwrite``."""
    from qtool.config.yaml_loader import dump  # here, so that listing recipes loads no YAML library

    return dump(recipe.model_dump(mode="json", exclude_unset=True, exclude={"output": {"overwrite"}}))


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data with every default filled in; ``Recipe.model_validate`` reads it back."""
    data = recipe.model_dump(mode="json")
    # defaults of an override stay out: filled in, they would replace the values of section quant
    data["quant"]["overrides"] = {
        pattern: override.model_dump(mode="json", exclude_unset=True)
        for pattern, override in recipe.quant.overrides.items()
    }
    return data
