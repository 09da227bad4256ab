"""The commands as functions: quantize, plan, export, evaluate, verify, reproduce.

A pipeline reads a recipe, calls the rooms below in order, and writes the output folder; it computes nothing itself.
May import everything but ``cli`` and ``sweeps``.
Begin with ``quantize.py``, the main job; ``run_state.py`` describes the folder from which a killed run continues, and
``api.py`` holds the functions of ``import qtool``.
"""
