"""List the keys of a recipe with defaults and descriptions, for ``--help`` and the JSON schema."""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from qtool.config import catalog, plugins, validation
from qtool.config.recipe import Recipe
from qtool.config.section import Section
from qtool.config.sections import MethodConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# words for the types of values
_KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path", ByteSize: "size"}


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors: a ``method`` section has the keys of the method it names."""
    whole = Recipe.model_json_schema()
    sections = []
    for name in catalog.methods():
        section = plugins.get(name).config.model_json_schema()
        whole["$defs"] |= section.pop("$defs", {})
        section["properties"]["name"] = {"const": name, "description": plugins.get(name).summary}
        section["required"] = sorted({"name", *section.get("required", ())})
        sections.append(section)
    del whole["$defs"]["MethodConfig"]
    whole["properties"]["method"] = {"description": whole["properties"]["method"]["description"], "oneOf": sections}
    whole["$defs"]["QuantConfig"]["properties"]["overrides"]["type"] = ["object", "string"]  # or a file with overrides
    whole["$defs"]["ActivationGrid"]["type"] = ["object", "integer"]  # or its bits alone
    whole["$defs"]["TargetConfig"]["type"] = ["object", "string"]  # or the engine's name alone
    whole["$defs"]["TrackerConfig"]["type"] = ["object", "string"]  # or the tracker's name alone
    whole["$defs"]["ExportConfig"]["properties"]["format"]["enum"] = list(catalog.export_formats())
    return {"$schema": DIALECT, **whole, "title": "qtool recipe"}


class Key(NamedTuple):
    """One line of a recipe as ``--help`` shows it, and the type of its value as the reference of the docs does."""

    name: str
    default: str
    description: str
    kind: str = "text"


def keys(command: str | None = None) -> dict[str, tuple[str, list[Key]]]:
    """Return description and keys of each section; ``method gptq`` is a method's (those of ``command``, or all)."""
    table: dict[str, tuple[str, list[Key]]] = {}
    alone = []
    for name, field in Recipe.model_fields.items():
        hint = validation.bare(field.annotation)
        text = field.description or ""
        if hint is MethodConfig:
            fitting = [each for each in catalog.methods() if command in (None, plugins.get(each).command)]
            table[name] = text, [Key("name", "required", f"One of: {', '.join(fitting)}.")]
            for method in fitting:
                own = [key for key in keys_of(plugins.get(method).config) if key.name != "name"]
                table[f"{name} {method}"] = plugins.get(method).summary, own
        elif get_origin(hint) is tuple:
            rows = keys_of(validation.bare(get_args(hint)[0]))
            if name == "export":
                rows[0] = Key("format", "required", f"One of: {', '.join(catalog.export_formats())}.")
            table[f"{name}.N"] = text, rows
        elif issubclass(hint, Section):
            table[name] = text, keys_of(hint)
        else:
            alone.append(_key(name, field))
    return {**table, "": ("Keys of the whole run.", alone)}


def shared_keys() -> list[str]:
    """Return the dotted names of all keys but those of methods; no method is imported."""
    found = []
    for name, field in Recipe.model_fields.items():
        hint = validation.bare(field.annotation)
        if hint is MethodConfig:
            found.append(f"{name}.name")
        elif get_origin(hint) is tuple:
            found += [f"{name}.0.{key.name}" for key in keys_of(validation.bare(get_args(hint)[0]))]
        elif issubclass(hint, Section):
            found += [f"{name}.{key.name}" for key in keys_of(hint)]
        else:
            found.append(name)
    return found


def method_keys(method: str) -> list[str]:
    """Return the names of the keys of a method's section; its file is imported."""
    return [key.name for key in keys_of(plugins.get(method).config)]


def keys_of(section: type[Section], before: str = "", values: Section | None = None) -> list[Key]:
    """Return the keys of ``section``; nested ones get a dotted prefix. ``values``, an instance, replaces defaults."""
    found = []
    for name, field in section.model_fields.items():
        hint, value = validation.bare(field.annotation), getattr(values, name, None)
        if isinstance(hint, type) and issubclass(hint, Section):
            found += keys_of(hint, f"{before}{name}.", value or field.default)
        else:
            key = _key(f"{before}{name}", field)
            if field.is_required() and before:  # needed only by a recipe with the section around it
                key = key._replace(default="")
            found.append(key if values is None else key._replace(default=_shown(value)))
    return found


def _key(name: str, field: FieldInfo) -> Key:
    default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
    return Key(name, default, describe(field), kind_of(field.annotation, *field.metadata))


def kind_of(hint: Any, *rules: Any) -> str:
    """Return the type of a value in words, with the limits that ``rules`` (of annotated-types) set to it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return kind_of(*inner, *rules)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(kind_of(each, *rules) for each in inner if each is not type(None)))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner)) if len(inner) > 1 else str(inner[0])
    if origin is tuple:
        return f"list of {kind_of(inner[0])}" if inner[1:] == (...,) else f"list of {len(inner)}: {kind_of(inner[0])}"
    if origin is dict:
        value = kind_of(inner[1])
        return value if value == "mapping" else f"mapping to {value}"
    if isinstance(hint, type) and issubclass(hint, Section):
        return "mapping"
    return " ".join([_KINDS.get(hint, "any value"), *_limits(rules)])


def _limits(rules: tuple[Any, ...]) -> list[str]:
    words = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    return [f"{word} {getattr(rule, name)}" for name, word in words.items() for rule in rules if hasattr(rule, name)]


def _shown(default: object) -> str:
    empty = default is None or default in ({}, ())
    if isinstance(default, ByteSize):
        return default.human_readable(decimal=True)
    return "" if empty else validation.found(default).replace('"', "").strip("[]")


def describe(field: FieldInfo) -> str:
    """Return the description of a key, followed by its choices if it is a ``Literal``."""
    hint = validation.bare(field.annotation)
    choices = f" One of: {', '.join(map(str, get_args(hint)))}." if get_origin(hint) is Literal else ""
    return (field.description or "") + choices
