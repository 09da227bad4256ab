"""The decoder blocks of a model, one after another, each fed by the blocks already quantized.

May import ``models``, ``quant``, ``config`` and ``system``, and the records of ``reports``.
Begin with ``job.py`` (what a method gets and returns), then ``driver.py`` (the loop over the blocks) and ``task.py``
(what a method does with one block). ``stages.py`` holds the greenlets, ``folds.py`` moves scales between modules.
"""
