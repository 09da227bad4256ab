"""The manifest of a checkpoint, ``qtool.json``: the recipe, the lock, the sizes and the hashes of its files.

It is written last, so its presence means that the checkpoint is complete. ``qtool eval``, ``export``, ``verify`` and
``reproduce`` read it. Recipes in manifests may name methods of other versions of qtool: ``recorded`` reads only the
keys that every recipe has, ``recipe_again`` checks the whole recipe.
"""

from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from qtool.allocation.plan import BitPlan
from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import MANIFEST
from qtool.config import plugins
from qtool.config.recipe import Recipe, check
from qtool.config.section import SEED_LIMIT
from qtool.config.sections import DataConfig, ExpectedConfig
from qtool.reports.records import Count, FilePath, Lock, Number, Seconds, Series, Sha256
from qtool.system import reading
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

    tokens: tuple[Count, Count]  # their shape [n, t]
    sha256: Sha256  # SHA-256 of tokens and labels
    rendering: str | None = None  # as in a report's CalibrationText
    num_learned: Count | None = None


class Manifest(BaseModel):
    """The content of ``qtool.json``."""

    model_config = ConfigDict(frozen=True, extra="ignore", ignored_types=(cached_property,))

    format_version: int
    recipe: dict[str, JsonValue]  # all keys, with defaults filled in
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
    data: CalibrationTokens | None
    label: str
    bits_per_weight: Annotated[float, Field(gt=0, le=64)]
    float_bytes: Count
    quantized_bytes: Count
    series: tuple[Series, ...]
    weight_errors: dict[str, Number]
    seconds: dict[str, Seconds]
    versions: dict[str, str]
    date: str
    plan: BitPlan | None = None  # bit widths chosen for a budget, if the recipe has one
    command: str
    lock: Lock
    # SHA-256 of each file that a reader computes with (of earlier versions: safetensors files)
    files: dict[FilePath, Sha256]

    @cached_property
    def recorded(self) -> RecordedRecipe:
        """The recorded recipe, without the keys of its method."""
        return RecordedRecipe.model_validate(self.recipe)

    def recipe_again(self, folder: Path) -> Recipe:
        """Return the recorded recipe, checked like a new one; ``folder`` is the checkpoint's, for messages.

        Raises:
            InputError: this version of qtool does not accept it.
        """
        recipe = check(Recipe, self.recipe, f"the recipe in {folder / MANIFEST}")
        command = plugins.get(recipe.method.name).command
        if command != self.command:
            raise InputError(
                f"{folder / MANIFEST} is damaged: command is {self.command}, but method {recipe.method.name} runs as "
                f"qtool {command}"
            )
        return recipe

    def write(self, folder: Path) -> None:
        """Write ``qtool.json`` into ``folder``."""
        content = self.model_dump(mode="json", exclude=None if self.plan else {"plan"})
        write_json(folder / MANIFEST, without_secrets(content))


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; ``None`` if it has none, like a folder that ``save_pretrained`` wrote.

    Raises:
        InputError: the file is damaged.
    """
    file, advice = folder / MANIFEST, "remove it to use the folder without it"
    try:
        manifest = reading.read_typed(file, Manifest, advice)
        _ = manifest.recorded
    except FileNotFoundError:
        return None
    except ValidationError as error:
        what = reading.fault(error, "recipe")
        raise InputError(f"{file} is damaged, or of another version of qtool ({what}); {advice}") from None
    return manifest
