"""Export formats: ``--format gptq`` is ``gptq.py`` here; files with an underscore are shared by the formats.

A format is written from the integer codes of a native checkpoint, then read back by code that shares nothing with the
writer. This room may import ``checkpoints``, ``models``, ``quant``, ``config`` and ``system``; it knows no method.
Begin with ``_base.py``, the contract ``Exporter``, and ``dense.py``, the smallest format.
"""
