"""The block driver: decoder blocks one after another, each fed by the blocks already quantized.

May import ``models``, ``quant``, ``config`` and ``system``.
Begin with ``driver.py`` (the loop over blocks), then ``task.py`` (what a method does with one block); ``calls.py``
records how the model calls its blocks.
"""
