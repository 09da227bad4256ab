"""Method plugins: ``method.name: gptq`` is ``qtool/methods/gptq.py``. Nothing is registered."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from pkgutil import iter_modules
from typing import Any, Literal

from qtool.config.sections import MethodConfig

Command = Literal["ptq", "qat", "efficientqat", "lrqat"]


@dataclass(frozen=True)
class Method:
    """What a method file exports as ``METHOD``.

    ``run(model, tokens, quant, config, seed)`` leaves every target linear of ``model`` a ``PackedLinear`` and no
    other, and returns named series of numbers for the manifest (e.g. ``{"block_error": [...]}``). The result
    depends on its arguments only. ``tokens`` is ``[n, t]`` int64, or ``None`` when ``needs_data`` says so.

    Where not every token is to be learned, a method that ``takes_labels`` is also called with ``labels=``: ``[n, t]``
    int64, the token itself or -100, at the same positions as ``tokens``.
    """

    command: Command
    summary: str
    config: type[MethodConfig]
    run: Callable[..., dict[str, list[float]]]
    needs_data: Callable[[Any], bool] = lambda config: True
    end_to_end: Callable[[Any], bool] = lambda config: False  # whether it trains the whole model, last of all
    takes_labels: bool = False


@cache
def names() -> tuple[str, ...]:
    """Every method, by file name."""
    return _modules("methods")


@cache
def export_formats() -> tuple[str, ...]:
    """Every export format by name: ``compressed-tensors`` is ``qtool/exporters/compressed_tensors.py``."""
    return tuple(name.replace("_", "-") for name in _modules("exporters"))


def _modules(room: str) -> tuple[str, ...]:
    """The files and packages of a room whose names have no underscore in front; none of them is imported."""
    folder = str(files("qtool") / room)
    return tuple(sorted(found.name for found in iter_modules([folder]) if not found.name.startswith("_")))


def get(name: str) -> Method:
    """The method called ``name``, which must be one of ``names()``."""
    method: Method = import_module(f"qtool.methods.{name}").METHOD
    return method
