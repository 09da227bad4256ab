"""The ``target`` section of a recipe: the engine that will load the result."""

from pydantic import Field, field_validator

from qtool.config.engines import ENGINES
from qtool.config.section import Section, text_as
from qtool.system.errors import nearest


class TargetConfig(Section):
    """The engine that will load the result; its name alone is short for ``{engine: NAME}``."""

    engine: str = Field(
        description="Engine that will load the result; grids, activations and tables that it does not load are refused "
        "before the run, and an export that it reads is added if export names none. Its name alone, target: vllm, is "
        f"short. One of: {', '.join(ENGINES)}.",
    )
    version: str | None = Field(
        None,
        pattern=r"\d+(\.\w+)*",
        description="Version of the engine; a note says if it is not the one whose formats are known.",
    )

    _name_alone = text_as("engine")

    @field_validator("version", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        """Take a number, as YAML reads ``0.33``."""
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("engine")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ENGINES:
            hint = nearest(value, ENGINES, "the nearest is {}; ")
            raise ValueError(f"no such engine; {hint}known: {', '.join(ENGINES)}")
        return value

    @property
    def said(self) -> str:
        """The engine in short, with its version if the recipe names one."""
        return self.engine if self.version is None else f"{self.engine} {self.version}"
