"""The base of every part of a recipe."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of a recipe. It refuses keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former key -> its new name, and what a user must know to convert the value; the refusal of the key quotes it."""
