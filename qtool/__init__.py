"""qtool: make large language models small.

``import qtool`` teaches transformers to load native checkpoints, as soon as transformers itself is imported. It imports
neither torch nor transformers, so that the command line starts at once: each function below is loaded when it is first
used. docs/python.md shows them at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from qtool.system.errors import InputError, QtoolError, RunError
from qtool.system.post_import import when_imported
from qtool.system.version import __version__

if TYPE_CHECKING:
    from qtool.pipelines.api import (
        bench,
        compare,
        evaluate,
        export,
        formats,
        kl,
        load_recipe,
        methods,
        perplexity,
        plan,
        quantize,
        quantize_model,
        recipes,
        use_backend,
    )

__all__ = [
    "InputError",
    "QtoolError",
    "RunError",
    "__version__",
    "bench",
    "compare",
    "evaluate",
    "export",
    "formats",
    "kl",
    "load_recipe",
    "methods",
    "perplexity",
    "plan",
    "quantize",
    "quantize_model",
    "recipes",
    "use_backend",
]


if not TYPE_CHECKING:  # a type checker reads the imports above, and finds names that do not exist

    def __getattr__(name: str) -> object:
        """Load a function of the public API when it is first asked for (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module 'qtool' has no attribute {name!r}")
        found = getattr(import_module("qtool.pipelines.api"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)


def _register() -> None:
    import qtool.checkpoints.transformers_hook  # noqa: F401  # registers by decorators


when_imported("transformers.modeling_utils", _register)
