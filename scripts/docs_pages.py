"""Pages of the documentation that are made from the code: the keys of a recipe, and the packaged recipes.

``docs_hooks.py`` adds them to the site when it is built. To see one of them as Markdown:

    python scripts/docs_pages.py recipes/keys.md
"""

import re
import sys
from collections.abc import Callable, Iterator

from qtool.config import catalog, describe, files, plugins
from qtool.config.describe import Key
from qtool.config.quant import QuantOverride, TableGrid

# keys by the unit of their numbers; a key with a dot counts before one without
_KEYS_BY_UNIT = {
    "bits": "num_bits kv_cache choices floors pins",
    "bits per weight": "average_bits",
    "bytes": "size memory_budget",
    "channels": "group_size kv_group_size",
    "codes": "zero_travel",
    "columns": "block_size",
    "examples": "num_fewshot",
    "exponents": "num_ratios",
    "iterations": "hqq.iterations",
    "nats per token": "max_kl",
    "parts": "accumulation slices",
    "passes": "epochs",
    "per code": "rounding.temperature temperature_end sharpness",
    "prompts": "continuations",
    "quantization steps": "travel scale_travel",
    "ranges": "clip_steps",
    "refinements": "svd_steps",
    "a share": "clip ce_share damp final_share norm_travel max_loss outliers scale_share share warmup_share",
    "steps": "iterations min_steps save_every steps validate_every",
    "tokens": "context min_expert_tokens seq_len top_k",
    "windows": "batch_size check_samples num_samples search_samples validation_samples",
    "windows or examples": "limit",
    "windows or requests": "eval.batch_size",
    "": "alpha beta beta_growth betas eps gptaq gsq.temperature gsq.travel low_rank lr max_grad_norm norm power "
    "quant_lr range_factor range_travel rank scale_lr seed strength temperature value weight_decay weight_lr",
}
UNITS = {key: unit for unit, keys in _KEYS_BY_UNIT.items() for key in keys.split()}

KEYS_INTRODUCTION = """\
# All keys

Every key of a recipe outside the section `method`, whose keys are on [another page](methods.md). Both pages are made
from the code that checks recipes. `qtool ptq --help` shows the same keys in a terminal, and `qtool schema` prints them
as a JSON schema.

A dotted key such as `budget.size` is a key in a section of its own: `quant: {budget: {size: 2GB}}`, or `--set
quant.budget.size=2GB`. A key without a default may be left out, unless it is required. A size is a whole number of
bytes, or a number with a unit: `4GB`, `512MiB`.
"""
METHODS_INTRODUCTION = """\
# Keys of the methods

The keys of the section `method`, by `method.name`. [Choose](../choose.md) says which method is for which case, and
[Train](../train/index.md) what the keys of trainings are for. `rounding`, `optim`, `guided` and `e2e` are sections
within `method`.
"""
PACKAGED_INTRODUCTION = """\
# Packaged recipes

`qtool recipes` lists these names, and `qtool recipes NAME` prints one. A name is given to the command in place of a
file, and `--set` changes its keys:
"""


def keys() -> str:
    """Return the page of the keys of all sections but ``method``."""
    table = describe.keys()
    parts = [KEYS_INTRODUCTION]
    for section, (text, rows) in table.items():
        if section == "":
            parts.append(section_of("Keys of the whole run", "", rows, ""))
        elif not section.startswith("method"):
            title = section.removesuffix(".N")
            note = " This section is a list: each entry has these keys." if title != section else ""
            parts.append(section_of(f"`{title}`", text + note, rows, title))
            parts += list(_inner(title))
    return "\n".join(parts)


def _inner(title: str) -> Iterator[str]:
    if title == "quant":
        text = f"{(QuantOverride.__doc__ or '').splitlines()[0]}".replace("``", "`")
        yield section_of("`quant.overrides.PATTERN`", text, describe.keys_of(QuantOverride), title, inherits=True)
        text = f"{(TableGrid.__doc__ or '').splitlines()[0]}".replace("``", "`")
        yield section_of("`quant.embedding`, `quant.head`", text, describe.keys_of(TableGrid), title)


def methods() -> str:
    """Return the page of the keys of each method, by command."""
    table = describe.keys()
    parts = [METHODS_INTRODUCTION]
    for name in sorted(catalog.methods(), key=lambda name: (plugins.get(name).command, name)):
        text, rows = table[f"method {name}"]
        command = f"`qtool {plugins.get(name).command}`: {text}"
        parts.append(section_of(f"`{name}`", command, rows, name))
    return "\n".join(parts)


def section_of(title: str, text: str, rows: list[Key], section: str, inherits: bool = False) -> str:
    """Return a heading and the table of keys; ``inherits``: a key that is left out has no default of its own."""
    lines = [f"## {title}", ""] + ([text, ""] if text else [])
    if not rows:
        return "\n".join([*lines, "This method has no keys but its name.", ""])
    lines += ['<div class="keys" markdown>', "", "| key | value | default | what it is |", "|---|---|---|---|"]
    for row in rows:
        default = "" if inherits else shown(row)
        cells = [f"`{row.name}`", value(row, section), default, without_choices(row)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", "</div>", ""])


def unit(name: str, section: str) -> str | None:
    """Return the unit of a key, "" of a plain number; ``None`` if no unit is known."""
    parts = [section, *name.split(".")]
    for start in range(len(parts)):
        found = UNITS.get(".".join(parts[start:]))
        if found is not None:
            return found
    return None


def is_number(key: Key) -> bool:
    """Return whether the value of a key is a number, perhaps in a list or a mapping, or else a word."""
    return bool(re.search(r"number|size|one of [\d, ]+$", key.kind))


def value(key: Key, section: str) -> str:
    """Return the type of a key with its unit."""
    measured = unit(key.name, section) if is_number(key) else None
    if not measured:
        return key.kind
    return f"{key.kind}, {measured}" if measured in ("per code", "a share") else f"{key.kind}, in {measured}"


def shown(key: Key) -> str:
    """Return the default of a key as a recipe would have it."""
    if key.default == "required" or not key.default:
        return key.default
    return f"`{key.default}`"


def without_choices(key: Key) -> str:
    """Return the description of a key without the choices, which its type names already."""
    listed = key.kind.removeprefix("one of ")
    return key.description.removesuffix(f" One of: {listed}.")


def packaged() -> str:
    """Return the page of the packaged recipes and sweeps: each with its first line and its command."""
    example = "```console\n$ qtool ptq quickstart --set quant.num_bits=3 --set output.path=out/quickstart-3\n```\n"
    parts = [PACKAGED_INTRODUCTION, "<!-- not run: qtool ptq quickstart is run on the start page -->", example]
    groups = {"": "Recipes", "models": "For one model", "papers": "By the settings of papers", "tables": "Sweeps"}
    found = files.packaged() | files.tables()
    for group, title in groups.items():
        parts += [f"## {title}", "", "| what it does | command |", "|---|---|"]
        for name, path in found.items():
            if (name.split("/")[0] if "/" in name else "") == group:
                what, command = path.read_text(encoding="utf-8").splitlines()[:2]
                parts.append(f"| {what.removeprefix('# ')} | `{command.removeprefix('#').strip()}` |")
        parts.append("")
    return "\n".join(parts)


# functions that make a page, by its place in docs/
PAGES: dict[str, Callable[[], str]] = {
    "recipes/keys.md": keys,
    "recipes/methods.md": methods,
    "recipes/packaged.md": packaged,
}

if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in PAGES:
        print(PAGES[sys.argv[1]]())
    else:
        raise SystemExit(f"give one of: {', '.join(PAGES)}")
