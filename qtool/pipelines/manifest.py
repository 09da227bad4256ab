"""The manifest of a checkpoint, ``qtool.json``: how it was made. Its presence means that the write finished."""

import json
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from qtool.allocation.plan import BitPlan
from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import MANIFEST
from qtool.config.recipe import Recipe
from qtool.config.sections import DataConfig, ExpectedConfig
from qtool.reports.records import Lock, Number, Series
from qtool.system.errors import InputError


class _Recorded(BaseModel):
    """A part of a recorded recipe; keys that are not asked for here are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")


class RecordedModel(_Recorded):
    """The section ``model``."""

    path: str


class RecordedMethod(_Recorded):
    """The section ``method``."""

    name: str


class RecordedRecipe(_Recorded):
    """The keys of a recorded recipe that an evaluation or an export asks for, whatever method it names."""

    model: RecordedModel
    method: RecordedMethod
    data: DataConfig = DataConfig()
    expected: tuple[ExpectedConfig, ...] = ()


class CalibrationTokens(_Recorded):
    """The calibration windows that a run used."""

    tokens: tuple[int, int]  # their shape
    sha256: str


class Manifest(BaseModel):
    """How a checkpoint was made."""

    model_config = ConfigDict(frozen=True, extra="ignore", ignored_types=(cached_property,))

    format_version: int
    recipe: dict[str, JsonValue]  # every key, with defaults filled in
    seed: int
    data: CalibrationTokens | None
    label: str
    bits_per_weight: float
    float_bytes: int
    quantized_bytes: int
    series: tuple[Series, ...]
    weight_errors: dict[str, Number]
    seconds: dict[str, float]
    versions: dict[str, str]
    date: str
    plan: BitPlan | None = None  # of a recipe with a budget
    command: str
    lock: Lock
    files: dict[str, str]  # SHA-256 of each safetensors file

    @cached_property
    def recorded(self) -> RecordedRecipe:
        """The recorded recipe, read without the method that it names."""
        return RecordedRecipe.model_validate(self.recipe)

    def recipe_again(self) -> Recipe:
        """The recorded recipe, checked as a new one.

        Raises:
            InputError: this version of qtool does not take it.
        """
        try:
            return Recipe.model_validate(self.recipe)
        except ValidationError as error:
            raise InputError(f"the recipe in {MANIFEST} is not one of this version of qtool: {error}") from None

    def write(self, folder: Path) -> None:
        """Write ``qtool.json``."""
        write_json(folder / MANIFEST, self.model_dump(mode="json", exclude=None if self.plan else {"plan"}))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; ``None`` where there is none, as in what ``save_pretrained`` wrote.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    try:
        manifest = Manifest.model_validate(json.loads(file.read_text(encoding="utf-8")))
        _ = manifest.recorded
    except (OSError, ValueError) as error:
        reason = f"{error.error_count()} faults in its keys" if isinstance(error, ValidationError) else repr(error)
        raise InputError(f"{file} is damaged ({reason}); remove it to use the folder without it") from None
    return manifest
