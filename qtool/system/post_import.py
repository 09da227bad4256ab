"""Run a function as soon as a module has been imported, without importing it now.

The standard library has no such hook. wrapt has one, but importing wrapt takes as long as the rest of
``qtool --help``.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from importlib.abc import Loader


def when_imported(name: str, run: Callable[[], None]) -> None:
    """Call ``run`` once, after the module ``name`` was imported; at once if it is imported already."""
    if name in sys.modules:
        run()
    else:
        sys.meta_path.insert(0, _Finder(name, run))


class _Finder:
    """Finds one module as the other finders do, and has ``run`` called after its code."""

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self.name = name
        self.run = run
        self.searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _Loader(spec.loader, self))
        return spec


class _Loader:
    """Loads the module with its own loader, which the module keeps; a module that fails to load may be tried again."""

    def __init__(self, loader: "Loader", finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            self.finder.run()
