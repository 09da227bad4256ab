"""Changes of plain data and of text that make inputs wrong in many ways, all drawn from one random generator."""

import copy
import math
from collections.abc import Iterator
from random import Random
from typing import Any

PATHS = (
    "",
    ".",
    "..",
    "/",
    "~",
    "~nosuchuser/x",
    "$NOSUCHVARIABLE/x",
    "${",
    "a\0b",
    "\ud800",
    "/dev/zero",
    "/dev/null",
)
TEXTS = (
    *PATHS,
    "x",
    "auto",
    "9" * 400,
    "x" * 5000,
    "/".join("y" * 300),
    "é" * 200,
    "\x1b[31m",
    "a\nb",
    "null",
    "../../x",
)
NUMBERS = (0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**63, 10**30, -(10**20), 10**400, 0.5, -0.5, 1e-300, 1e308)
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    math.inf,
    -math.inf,
    math.nan,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    {"x": [1, {"y": 2}]},
)
VALUES: tuple[Any, ...] = (*TEXTS, *NUMBERS, *ODD)
PIECES = (
    *(
        "\0",
        "\ud800",
        "\x85",
        "\u2028",
        "\t",
        "\r\n",
        "\ufeff",
        "{",
        "}",
        "[",
        "]",
        ":",
        "- ",
        "? ",
        "# ",
        "| ",
        "> ",
        "'",
    ),
    *('"', "&a ", "*a", "<<: *a", "<<: [*a, *a]", "!!binary x", "!!set {a}", "!!python/name:os.system ", "%YAML 1.1\n"),
    *(
        "---\n",
        "...\n",
        "~",
        "$HOME",
        "$$",
        "0x",
        "1e999",
        ".nan",
        ".inf",
        "-",
        "99999999999999999999",
        "..",
        "\\",
        ",",
    ),
)


def paths_of(data: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in nested dicts and lists."""
    yield before
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield from paths_of(value, (*before, key))


def changed(data: Any, random: Random, others: tuple[Any, ...] = ()) -> Any:
    """Return a copy of ``data`` with one random change; ``others`` are further values to put in."""
    data = copy.deepcopy(data)
    path = random.choice([path for path in paths_of(data) if path] or [()])
    if not path:
        return random.choice(VALUES)
    place = data
    for key in path[:-1]:
        place = place[key]
    key, value = path[-1], place[path[-1]]
    match random.choice(["replace"] * 4 + ["delete", "rename", "add", "repeat", "nest", "swap"]):
        case "replace":
            place[key] = random.choice((*VALUES, *others))
        case "delete":
            del place[key]
        case "rename" if isinstance(place, dict):
            place[str(key) + random.choice(("s", "_", ".x", "\0", "x" * 500))] = place.pop(key)
        case "add" if isinstance(place, dict):
            place[random.choice(("x", "name", "path", "num_bits", "<<", "", "0", "x.y"))] = random.choice(VALUES)
        case "repeat":
            place[key] = [value] * random.choice((2, 50, 1500))
        case "nest":
            for _ in range(random.choice((1, 30, 300))):
                value = random.choice(([value], {"a": value}))
            place[key] = value
        case _:
            other = random.choice([each for each in paths_of(data) if each])
            found = data
            for part in other:
                found = found[part]
            place[key] = copy.deepcopy(found)
    return data


def changed_text(text: str, random: Random) -> str:
    """Return ``text`` with one random change of a character, a piece, a line or the whole."""
    at, end = sorted(random.randrange(len(text) + 1) for _ in range(2))
    lines = text.splitlines(keepends=True)
    row = random.randrange(len(lines)) if lines else 0
    match random.choice(("insert", "insert", "cut", "end", "double", "drop", "swap", "indent", "number", "many")):
        case "insert":
            return text[:at] + random.choice(PIECES) + text[at:]
        case "cut":
            return text[:at] + text[min(end, at + random.randrange(1, 40)) :]
        case "end":
            return text[:at]
        case "double" if lines:
            return "".join([*lines[: row + 1], *lines[row:]])
        case "drop" if lines:
            return "".join([*lines[:row], *lines[row + 1 :]])
        case "swap" if lines:
            random.shuffle(lines)
            return "".join(lines)
        case "indent" if lines:
            lines[row] = random.choice((" ", "  ", "\t")) + lines[row]
            return "".join(lines)
        case "number":
            digits = [index for index, char in enumerate(text) if char.isdigit()]
            place = random.choice(digits or [0])
            return text[:place] + random.choice(("-", "9" * 30, "9" * 5000, "e9", ".", "1e400")) + text[place + 1 :]
        case _:
            return text[:at] + text[at:end][:200] * random.choice((2, 20, 2000)) + text[end:]
