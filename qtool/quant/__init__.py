"""The quantizer core: grids, rounding, packing, trained and packed layers, kernels. Tensors in, tensors out.

This room knows no model, file, recipe or transformers; it may import ``config`` (for ``QuantSpec``) and ``system``.
Begin with ``affine.py``, the grid; ``packed_linear.py`` is the layer that every method ends in, on the base
``packed_weight.py``, which ``packed_embedding.py`` has too.
"""
