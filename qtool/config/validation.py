"""Turn the faults that pydantic finds in a recipe into lines that a person can act on."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qtool.config import catalog, plugins
from qtool.config.section import Section
from qtool.config.sections import MethodConfig

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}


class _Place(NamedTuple):
    """The place of a fault: the path of keys, the section of the last key, its field, and the type it should have."""

    path: tuple[str, ...]
    owner: type[Section]
    field: FieldInfo | None
    hint: Any


def explain(kind: type[Section], raw: Mapping[str, object], error: ValidationError) -> list[str]:
    """Return a line for each fault of ``raw`` as a ``kind``: dotted key, what is wrong, and the value found."""
    faults: dict[tuple[str, ...], list[Any]] = {}
    for row in error.errors(include_url=False):
        faults.setdefault(_place(kind, raw, row["loc"]).path, []).append(row)
    lines = []
    inner = {path[:end] for path in faults for end in range(len(path))}
    for path, rows in faults.items():
        if path in inner:
            continue  # another branch of the union got further, so the user meant that one
        place = _place(kind, raw, rows[0]["loc"])
        value = rows[0]["input"]
        what = " or ".join(dict.fromkeys(_what(row) for row in rows)).replace(" or should be", " or")
        match rows[0]["type"]:
            case "missing":
                lines += [f"{'.'.join([*path, *rest])}: missing; {text}" for rest, text in _required(place)]
                continue
            case "value_error" if isinstance(value, Mapping):  # a rule between the keys of a section
                lines.append(": ".join(filter(None, (".".join(path), what))))
                continue
            case "extra_forbidden":
                new = place.owner.renamed.get(path[-1])
                what = f"this key is now {new}" if new else f"unknown key; {_nearest(kind, raw, place)}"
            case "tuple_type" if isinstance(value, str | int):
                what += f", such as [{value}]"
            case "model_type" if isinstance(place.hint, type) and issubclass(place.hint, Section):
                what += f" with keys {', '.join(place.hint.model_fields)}"
        lines.append(f"{'.'.join(path)}: {what}; found {found(value)}")
    return lines


def _place(kind: type[Section], raw: Mapping[str, object], loc: Sequence[int | str]) -> _Place:
    """Return the place of a pydantic location, which also names union branches."""
    path: list[str] = []
    hint: Any = kind
    owner, field = kind, None
    for part in loc:
        if isinstance(hint, type) and issubclass(hint, Section):
            owner, field = hint, hint.model_fields.get(str(part))
            hint = _section(raw, str(part), field) if field else None
        elif get_origin(hint) in (dict, tuple):
            hint = bare(get_args(hint)[get_origin(hint) is dict])
        elif get_origin(hint) in (Union, UnionType):
            sections = {each.__name__: each for each in get_args(hint) if isinstance(each, type)}
            # the branch of a class with a validator before it is called function-before[..., Class]
            named = next((each for name, each in sections.items() if name in str(part)), None)
            hint = dict[str, object] if str(part).startswith("dict") else named
            continue
        path.append(str(part))
    return _Place(tuple(path), owner, field, hint)


def _required(place: _Place) -> list[tuple[list[str], str]]:
    """Return the required keys below a missing one, with their descriptions."""
    if isinstance(place.hint, type) and issubclass(place.hint, Section):
        fields = place.hint.model_fields.items()
        return [([name], field.description or "") for name, field in fields if field.is_required()]
    return [([], (place.field and place.field.description) or "")]


def bare(hint: Any) -> Any:
    """Return a type without ``Annotated`` and without ``| None``."""
    if get_origin(hint) is Annotated:
        return bare(get_args(hint)[0])
    real = [arg for arg in get_args(hint) if arg is not type(None)]
    return real[0] if get_origin(hint) in (Union, UnionType) and len(real) == 1 else hint


def _section(raw: Mapping[str, object], key: str, field: FieldInfo) -> Any:
    """Return the type of a field; for ``method`` the section of the method that ``raw`` names."""
    hint, section = bare(field.annotation), raw.get(key)
    if hint is MethodConfig and isinstance(section, Mapping) and section.get("name") in catalog.methods():
        return plugins.get(str(section["name"])).config
    return hint


def _what(row: Any) -> str:
    name, _, rest = row["type"].partition("_")
    if rest in ("type", "parsing", "from_float") and name in _KINDS:
        return f"should be {_KINDS[name]}"
    if row["type"] == "invalid_key":
        return "a key should be text"
    return str(row["msg"]).replace("Input should", "should").removeprefix("Value error, ")


def _nearest(kind: type[Section], raw: Mapping[str, object], place: _Place) -> str:
    *before, last = place.path
    near = get_close_matches(last, place.owner.model_fields, n=1)
    if near:
        return f"the nearest is {'.'.join([*before, near[0]])}"
    if before == ["method"] and (others := _methods_with(last)):
        return f"a key of {', '.join(others)}, not of {place.owner.model_fields['name'].default or 'this method'}"
    for name, field in kind.model_fields.items():
        section = _section(raw, name, field)
        if isinstance(section, type) and issubclass(section, Section) and last in section.model_fields:
            return f"it belongs to {name}: {name}.{last}"
    return f"known: {', '.join(place.owner.model_fields)}"


def _methods_with(key: str) -> list[str]:
    """Return the methods whose sections have ``key``."""
    return [name for name in catalog.methods() if key in plugins.get(name).config.model_fields]


def found(value: object) -> str:
    """Return a value as a recipe would write it, cut to one short line."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (
        ValueError,
        TypeError,
        RecursionError,
    ):  # keys that are not text, a value that contains itself, a huge number
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else f"{text[:57]}..."
