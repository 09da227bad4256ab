"""What ``qtool plan --keep`` predicted of a run, kept in a file beside its output, ``<output>.plan.json``.

The run's report shows it beside what was measured. It counts only for a run of the same model, method, grids and text.
"""

import json
from pathlib import Path
from typing import Any

from qtool.config.recipe import Recipe, resolved
from qtool.pipelines import scale_dtype
from qtool.pipelines.lock import LOCKED_SECTIONS
from qtool.reports.forecast import Forecast
from qtool.reports.records import Planned
from qtool.system import reading
from qtool.system.errors import InputError
from qtool.system.writing import write_text


def file_of(recipe: Recipe) -> Path:
    """Return the file beside the output of a recipe."""
    output = recipe.output.path
    return output.with_name(f"{output.name}.plan.json")


def keep(recipe: Recipe, forecast: Forecast) -> Path:
    """Keep the sizes, time and memory of a forecast; return the file.

    Raises:
        InputError: the forecast has no time and memory.
    """
    if forecast.cost is None:
        raise InputError("--keep needs the time and memory of a probe: leave out --no-probe, and give the missing text")
    cost = forecast.cost
    planned = Planned(num_bytes=forecast.sizes[0].num_bytes, peak_bytes=cost.peak_bytes, seconds=cost.seconds)
    file, recipe = file_of(recipe), scale_dtype.chosen(recipe)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"of": _sections(recipe), "planned": planned.model_dump(mode="json")}, indent=2) + "\n")
    return file


def kept(recipe: Recipe) -> Planned | None:
    """Return what was predicted of a run of this recipe; ``None``: nothing, or of other settings."""
    try:
        found = reading.read_object(file_of(recipe))
    except (OSError, InputError):
        return None
    if found.get("of") != _sections(recipe):
        return None
    return Planned.model_validate(found.get("planned"))


def _sections(recipe: Recipe) -> dict[str, Any]:
    keys: dict[str, Any] = json.loads(json.dumps(resolved(recipe)))
    return {section: keys[section] for section in LOCKED_SECTIONS}
