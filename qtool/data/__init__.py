"""Calibration text and text for perplexity: from a source to windows of tokens.

This room may import ``models``, ``quant``, ``config`` and ``system``.
Begin with ``windows.py``; ``sources.py`` lists the sources, ``readers.py`` reads files, ``hub.py`` asks the hub.
"""
