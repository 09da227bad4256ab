"""Training: the optimizer loop, losses, end-to-end training of a whole model, and sharding it over processes.

Used by the methods that train. May import ``blocks``, ``checkpoints``, ``data``, ``models``, ``quant``,
``reports``, ``config`` and ``system``.
Begin with ``linears.py`` (train a layer in the place of each target), then ``plan.py``,
``end_to_end.py`` and ``fit.py``.
"""
