"""qtool: make large language models small.

``import qtool`` teaches transformers to load native checkpoints, as soon as transformers itself is imported; it
imports neither torch nor transformers, so that the command line starts at once.
"""

from typing import TYPE_CHECKING

import wrapt

from qtool.system.version import __version__ as __version__

if TYPE_CHECKING:
    from torch import nn

    from qtool.models.backend import Backends


@wrapt.when_imported("transformers.modeling_utils")
def _register(_: object) -> None:
    import qtool.checkpoints.transformers_hook  # noqa: F401  # registers by decorators


def use_backend(model: "nn.Module", name: str = "fast") -> "Backends":
    """Let a loaded model decode with this machine's packed kernels (``fast``), or exactly again (``exact``).

    Returns what serves which linears; a linear without a kernel stays exact, and that is warned about.
    """
    import warnings

    from qtool.models import backend

    found = backend.use_backend(model, name)
    if name == "fast" and found.exact:
        warnings.warn(f"qtool.use_backend: {found}", stacklevel=2)
    return found
