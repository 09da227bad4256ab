"""Apply ``--set section.key=value``, a change of one key of a recipe, before the recipe is checked."""

import re
from collections.abc import Sequence
from typing import Any, cast

from qtool.config import validation

PATTERNED = re.compile(r"(quant\.(?:overrides|budget\.(?:floors|pins)))\.(.+)")  # after these a key may have dots


def overridden(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return ``raw`` with each ``section.key=value`` put in, and the faults of those that cannot be put in."""
    wrong = []
    for text in overrides:
        try:
            raw = changed(raw, *assignment(text))
        except ValueError as error:
            wrong.append(f"--set {text}: {error}")
    return raw, wrong


def assignment(text: str) -> tuple[str, Any]:
    """Split ``section.key=value`` into key and value; raise a ``ValueError`` for anything else."""
    from qtool.config.yaml_loader import parse

    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError("write section.key=value")
    return key, parse(value)


def changed(raw: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """Return ``raw`` with ``value`` at the dotted ``key``; raise a ``ValueError`` if ``raw`` has no such place."""
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
    """Return ``target`` with ``value`` at the path ``parts``; missing sections and list entries are made."""
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
        raise ValueError(f"{before} is a list of {len(target)}: after {before} write a number from 0 to {len(target)}")
    index = int(part)
    return [
        *target[:index],
        _put(target[index] if index < len(target) else None, rest, value, here),
        *target[index + 1 :],
    ]
