"""Calibration text: from a source to windows of tokens.

May import ``models``, ``config`` and ``system``.
Begin with ``windows.py``; ``sources.py`` lists the sources, ``readers.py`` reads files, ``hub.py`` asks the hub.
"""
