"""Quantization methods: ``method.name: gptq`` is ``gptq.py`` here, and this room holds nothing else.

A method turns the targets of a job into packed linears, one decoder block at a time or by training the whole model.
May import ``training``, ``blocks``, ``checkpoints``, ``models``, ``quant``, ``reports``, ``config`` and ``system``;
knows no export format.
Begin with ``rtn.py``, the smallest; the contract is ``Method`` in ``blocks/job.py``.
"""

import sys
from types import ModuleType

from qtool.config import catalog


class _Room(ModuleType):
    """This package as a callable: importing it puts it in the place of the API's function ``qtool.methods``."""

    def __call__(self) -> tuple[str, ...]:
        """Return the names of the methods."""
        return catalog.methods()


sys.modules[__name__].__class__ = _Room
