"""Models: folders, loading, finding decoder blocks and linears, KV-cache rounding, decoding backends.

May import ``quant``, ``config`` and ``system``.
Begin with ``loading.py``; ``linears.py`` finds blocks and linears in the module tree, ``targets.py`` selects those to
quantize, ``tables.py`` embeddings and the head. ``builtin/`` holds the built-in model.
"""
