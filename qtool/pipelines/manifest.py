"""The manifest of a checkpoint, ``qtool.json``: the recipe, the lock, the sizes and the hashes of its files.

It is written last, so its presence means that the checkpoint is complete. ``qtool eval``, ``export``, ``verify`` and
``reproduce`` read it. Recipes in manifests may name methods of other versions of qtool: ``recorded`` reads only the
keys that every recipe has, ``recipe_again`` checks the whole recipe.
"""

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
from qtool.system.printable import without_secrets


class _Recorded(BaseModel):
    """A part of a recorded recipe; keys without a field here are kept unchecked."""

    model_config = ConfigDict(frozen=True, extra="allow")


class RecordedModel(_Recorded):
    """The section ``model``."""

    path: str


class RecordedMethod(_Recorded):
    """The section ``method``."""

    name: str


class RecordedRecipe(_Recorded):
    """The keys of a recorded recipe that evaluations and exports read, the same for all methods."""

    model: RecordedModel
    method: RecordedMethod
    data: DataConfig = DataConfig()
    expected: tuple[ExpectedConfig, ...] = ()


class CalibrationTokens(_Recorded):
    """The calibration windows that a run used."""

    tokens: tuple[int, int]  # their shape [n, t]
    sha256: str  # SHA-256 of tokens and labels


class Manifest(BaseModel):
    """The content of ``qtool.json``."""

    model_config = ConfigDict(frozen=True, extra="ignore", ignored_types=(cached_property,))

    format_version: int
    recipe: dict[str, JsonValue]  # all keys, with defaults filled in
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
    plan: BitPlan | None = None  # bit widths chosen for a budget, if the recipe has one
    command: str
    lock: Lock
    files: dict[str, str]  # SHA-256 of each file that a reader computes with (of earlier versions: safetensors files)

    @cached_property
    def recorded(self) -> RecordedRecipe:
        """The recorded recipe, without the keys of its method."""
        return RecordedRecipe.model_validate(self.recipe)

    def recipe_again(self) -> Recipe:
        """Return the recorded recipe, checked like a new one.

        Raises:
            InputError: this version of qtool does not accept it.
        """
        try:
            return Recipe.model_validate(self.recipe)
        except ValidationError as error:
            raise InputError(f"this version of qtool does not accept the recipe in {MANIFEST}: {error}") from None

    def write(self, folder: Path) -> None:
        """Write ``qtool.json`` into ``folder``."""
        content = self.model_dump(mode="json", exclude=None if self.plan else {"plan"})
        write_json(folder / MANIFEST, without_secrets(content))


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; ``None`` if it has none, like a folder that ``save_pretrained`` wrote.

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
        if isinstance(error, ValidationError):
            fault = error.errors()[0]
            reason = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        else:
            reason = str(error)
        raise InputError(
            f"{file} is damaged, or of another version of qtool ({reason}); remove it to use the folder without it"
        ) from None
    return manifest
