"""qtool: make large language models small.

``import qtool`` teaches transformers to load native checkpoints, as soon as transformers itself is imported; it
imports neither torch nor transformers, so that the command line starts at once.
"""

import wrapt

__version__ = "0.1.0"


@wrapt.when_imported("transformers.modeling_utils")
def _register(_: object) -> None:
    import qtool.hf  # noqa: F401  # registers by decorators
