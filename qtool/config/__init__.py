"""The recipe: its sections as pydantic models, YAML reading, validation messages, and plugin contracts.

May import ``system`` only.
Begin with ``recipe.py``; ``sections.py``, ``quant.py`` and ``training.py`` define the keys, ``plugins.py`` the methods
and formats by name.
"""
