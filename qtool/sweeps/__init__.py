"""Sweeps: a recipe run over a grid of keys, each cell in a process of its own, and the table of the results.

This room imports ``pipelines`` and everything below; only ``cli`` imports it. Begin with ``runner.py``, which is
``qtool sweep``; ``grid.py`` expands the YAML file into cells, and ``cell.py`` is one cell on disk.
"""
