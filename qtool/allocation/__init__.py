"""Mixed precision: which linear gets how many bits under a budget.

Sensitivity is measured on the float model, then a knapsack solver chooses widths.
May import ``methods`` and ``exporters`` and everything below those; does not know ``evaluation``.
Begin with ``plan.py``; ``sensitivity.py`` has the estimators, ``solvers.py`` the solvers.
"""
