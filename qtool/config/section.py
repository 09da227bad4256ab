"""The base of every part of a recipe."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of a recipe. It refuses keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")
