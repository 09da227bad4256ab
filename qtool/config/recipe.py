"""The recipe: YAML and ``--set`` overrides to one checked, frozen ``Recipe``, or every fault at once.

Reading a recipe imports one method file, the one that ``method.name`` asks for (its section is defined there);
importing this module imports none.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast, get_args, get_origin

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from qtool.config import plugins, validation
from qtool.config.sections import (
    DataConfig,
    EvalConfig,
    ExpectedConfig,
    ExportConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    QuantConfig,
    Section,
)
from qtool.config.yaml_loader import parse
from qtool.system.errors import InputError

S = TypeVar("S", bound=Section)
PATTERNED = re.compile(r"(quant\.(?:overrides|budget\.(?:floors|pins)))\.(.+)")  # keys that hold dots follow
DIALECT = "https://json-schema.org/draft/2020-12/schema"
TABLES = "tables/"  # what names of packaged sweeps begin with


def packaged() -> dict[str, Path]:
    """The recipes that come with qtool, by name: the path below ``recipes``, without the suffix."""
    return {name: path for name, path in _files().items() if not name.startswith(TABLES)}


def tables() -> dict[str, Path]:
    """The sweeps that come with qtool, by name."""
    return {name: path for name, path in _files().items() if name.startswith(TABLES)}


def _files() -> dict[str, Path]:
    folder = Path(str(files("qtool") / "recipes"))
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(names.items(), key=lambda item: (item[0].count("/"), item[0])))


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
        raise InputError("\n  ".join([f"{source} has {len(lines)} fault(s):", *lines]))
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
    raw, wrong = _override(read_yaml(path), overrides)
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


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors: a ``method`` section has the keys of the method it names."""
    whole = Recipe.model_json_schema()
    sections = []
    for name in plugins.names():
        section = plugins.get(name).config.model_json_schema()
        whole["$defs"] |= section.pop("$defs", {})
        section["properties"]["name"] = {"const": name, "description": plugins.get(name).summary}
        section["required"] = sorted({"name", *section.get("required", ())})
        sections.append(section)
    del whole["$defs"]["MethodConfig"]
    whole["properties"]["method"] = {"description": whole["properties"]["method"]["description"], "oneOf": sections}
    whole["$defs"]["QuantConfig"]["properties"]["overrides"]["type"] = ["object", "string"]  # or a file that has them
    whole["$defs"]["ExportConfig"]["properties"]["format"]["enum"] = list(plugins.export_formats())
    return {"$schema": DIALECT, **whole, "title": "qtool recipe"}


class Key(NamedTuple):
    """One line of a recipe as ``--help`` shows it."""

    name: str
    default: str
    description: str


def keys(command: str | None = None) -> dict[str, tuple[str, list[Key]]]:
    """Description and keys of each section; ``method gptq`` and the like are the methods (of ``command``, or all)."""
    table: dict[str, tuple[str, list[Key]]] = {}
    alone = []
    for name, field in Recipe.model_fields.items():
        hint = validation.bare(field.annotation)
        text = field.description or ""
        if hint is MethodConfig:
            fitting = [each for each in plugins.names() if command in (None, plugins.get(each).command)]
            table[name] = text, [Key("name", "required", f"One of: {', '.join(fitting)}.")]
            for method in fitting:
                own = [key for key in keys_of(plugins.get(method).config) if key.name != "name"]
                table[f"{name} {method}"] = plugins.get(method).summary, own
        elif get_origin(hint) is tuple:
            rows = keys_of(validation.bare(get_args(hint)[0]))
            if name == "export":
                rows[0] = Key("format", "required", f"One of: {', '.join(plugins.export_formats())}.")
            table[f"{name}.N"] = text, rows
        elif issubclass(hint, Section):
            table[name] = text, keys_of(hint)
        else:
            alone.append(_key(name, field))
    return {**table, "": ("Of the whole run.", alone)}


def keys_of(section: type[Section], before: str = "", values: Section | None = None) -> list[Key]:
    """The keys of ``section``, those of sections inside it with the name of that before them (and its ``values``)."""
    found = []
    for name, field in section.model_fields.items():
        hint, value = validation.bare(field.annotation), getattr(values, name, None)
        if isinstance(hint, type) and issubclass(hint, Section):
            found += keys_of(hint, f"{before}{name}.", value or field.default)
        else:
            key = _key(f"{before}{name}", field)
            found.append(key if values is None else key._replace(default=_shown(value)))
    return found


def _key(name: str, field: FieldInfo) -> Key:
    if field.is_required():
        return Key(name, "required", describe(field))
    return Key(name, _shown(field.get_default(call_default_factory=True)), describe(field))


def _shown(default: object) -> str:
    empty = default is None or default in ({}, ())
    return "" if empty else validation.found(default).replace('"', "").strip("[]")


def describe(field: FieldInfo) -> str:
    """What a key means, with the values it can have where they are few."""
    hint = validation.bare(field.annotation)
    choices = f" One of: {', '.join(map(str, get_args(hint)))}." if get_origin(hint) is Literal else ""
    return (field.description or "") + choices


def read_yaml(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """The sections of a recipe (or sweep) file, or of a packaged one's name, unchecked.

    Raises:
        InputError: Missing, a folder, not UTF-8, not YAML, empty, or no mapping.
    """
    path = Path(path)
    names = packaged() if what == "recipe" else tables()
    if path.is_dir() and str(path) not in names:
        raise InputError(f"{path} is a folder; a {what} is a YAML file")
    if not path.is_file() and str(path) not in names:
        nearest = get_close_matches(path.stem if what == "recipe" else str(path), names, n=1)
        hint = f"did you mean the packaged {what} {nearest[0]}?" if nearest else "qtool recipes lists those that exist"
        raise InputError(f"{path} does not exist; {hint}")
    try:
        text = (path if path.is_file() else names[str(path)]).read_bytes().decode("utf-8-sig")
        raw = parse(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} in line {line}") from error
    except ValueError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if raw is None:
        raise InputError(f"{path} is empty; qtool recipes quickstart prints a recipe to start from")
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds {validation.found(raw)}, not sections (model:, method:, ...)")
    return raw


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """``raw`` with each ``section.key=value`` put in, and what is wrong with those that cannot be."""
    wrong = []
    for text in overrides:
        try:
            raw = changed(raw, *assignment(text))
        except ValueError as error:
            wrong.append(f"--set {text}: {error}")
    return raw, wrong


def assignment(text: str) -> tuple[str, Any]:
    """Key and value of ``section.key=value``; anything else is a ``ValueError``."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError("write section.key=value")
    return key, parse(value)


def changed(raw: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """``raw`` with ``value`` at the dotted ``key``; a ``ValueError`` where there can be none."""
    patterned = PATTERNED.fullmatch(key)
    if not (patterned or re.fullmatch(r"[^.]+(\.[^.]+)*", key)):
        raise ValueError("write section.key=value")
    parts = key.split(".")
    if patterned:
        parts = [*patterned[1].split("."), patterned[2]]
        pattern, dot, last = patterned[2].rpartition(".")
        if dot and patterned[1] == "quant.overrides" and not isinstance(value, dict):
            parts[2:] = [pattern, last]
    return cast(dict[str, Any], _put(raw, parts, value))


def _put(target: object, parts: Sequence[str], value: object, before: str = "") -> object:
    """``target`` with ``value`` at the path ``parts``; sections and list entries on the way are made."""
    if not parts:
        return value
    part, *rest = parts
    here = f"{before}.{part}" if before else part
    if target is None:
        target = [] if before in ("export", "expected", "eval.tasks") else {}
    if isinstance(target, dict):
        return {**target, part: _put(target.get(part), rest, value, here)}
    if not isinstance(target, list):
        raise ValueError(f"{before} is {validation.found(target)}, which has no keys")
    if not part.isdecimal() or int(part) > len(target):
        raise ValueError(f"{before} is a list of {len(target)}: go on with a number from 0 to {len(target)}")
    index = int(part)
    return [
        *target[:index],
        _put(target[index] if index < len(target) else None, rest, value, here),
        *target[index + 1 :],
    ]
