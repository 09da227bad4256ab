"""The part of a method that a recipe needs: its section, one line about it, and the command that runs it.

The whole contract of a method is ``blocks.job.Method``, that of a format ``exporters._base.Exporter``.
"""

from importlib import import_module
from typing import Protocol

from qtool.config.sections import MethodConfig


class Plugin(Protocol):
    """The part of a method that a recipe needs."""

    @property
    def command(self) -> str:
        """The ``qtool`` command that runs it."""

    @property
    def summary(self) -> str:
        """One line for ``--help``."""

    @property
    def config(self) -> type[MethodConfig]:
        """The class of its section."""


def get(name: str) -> Plugin:
    """The method called ``name``, which must be one of ``catalog.methods()``; imports its file."""
    method: Plugin = import_module(f"qtool.methods.{name}").METHOD
    return method
