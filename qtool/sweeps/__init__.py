"""Sweeps: a recipe run over a grid of keys, each cell in a process of its own, and the table of the results.

May import ``pipelines`` and everything below; only ``cli`` imports it.
Begin with ``runner.py`` (``qtool sweep``); ``grid.py`` expands the YAML, ``cell.py`` is one cell on the disk.
"""
