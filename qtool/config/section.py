"""The base of every part of a recipe, and the limits of its values."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Le, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qtool.system import paths

WHOLE_LIMIT = 2**31  # a whole number of a recipe is below it, unless its field has an upper limit of its own
BYTES_LIMIT = 2**63  # a size in bytes is below it
SEED_LIMIT = 2**32  # a seed is below it, as numpy's are; seeds that are derived from it still fit torch


class Section(BaseModel):
    """A frozen part of a recipe. It refuses keys that it does not know, and numbers that no computation can take."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former key -> its new name, and what a user must know to convert the value; the refusal of the key quotes it."""

    @field_validator("*", mode="after")
    @classmethod
    def _bounded(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse whole numbers that are too large, and text that is no text, in the field or in a list or mapping."""
        metadata = cls.model_fields[str(info.field_name)].metadata
        _check_bounds(value, whole=not any(isinstance(each, Le | Lt) for each in metadata))
        return value


def text_as(key: str) -> Any:  # Any: what pydantic makes of a validator
    """Return a validator with which a text alone in place of a section is the value of its key ``key``."""

    def section(values: Any) -> Any:
        return {key: values} if isinstance(values, str) else values

    return model_validator(mode="before")(section)


def _check_bounds(value: object, *, whole: bool) -> None:
    """Raise a ``ValueError`` if a text or number in ``value`` is out of bounds; whole numbers only with ``whole``."""
    match value:
        case ByteSize():
            if value >= BYTES_LIMIT:
                raise ValueError(f"should be less than {BYTES_LIMIT} bytes")
        case int() if whole and not -WHOLE_LIMIT < value < WHOLE_LIMIT:
            raise ValueError(f"should be less than {WHOLE_LIMIT}")
        case str():
            if wrong := paths.text_fault(value):
                raise ValueError(wrong)
        case Mapping():
            for key, each in value.items():
                _check_bounds(key, whole=whole)
                _check_bounds(each, whole=whole)
        case list() | tuple():
            for each in value:
                _check_bounds(each, whole=whole)


def _expanded(value: object) -> object:
    return paths.expanded(value) if isinstance(value, str | Path) else value


def _named(path: Path) -> Path:
    if path.name in ("", ".."):
        raise ValueError("should be a folder with a name of its own")
    if len(os.fsencode(path.name)) > paths.LONGEST_NAME:
        raise ValueError(f"should have a name of at most {paths.LONGEST_NAME} bytes")
    return path


# a folder to write, in which ~ and variables are expanded; as data it is the text that means it
OutputPath = Annotated[
    Path,
    BeforeValidator(_expanded),
    AfterValidator(_named),
    PlainSerializer(paths.path_text, return_type=str, when_used="json"),
]
