"""Mixed precision: which linear or table gets how many bits under a budget.

Sensitivity is measured on the float model, then a knapsack solver chooses widths.
May import ``methods`` and ``exporters`` and everything below those; does not know ``evaluation``.
Begin with ``plan.py``; ``units.py`` says what gets a width of its own, ``sensitivity.py`` has the estimators,
``solvers.py`` the solvers.
"""
