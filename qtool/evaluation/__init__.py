"""Measurements: perplexity, KL divergence, lm-eval tasks, speed, contamination, weight errors.

Numbers only; ``reports`` shows them. May import ``exporters`` and ``methods`` and everything below those.
Begin with ``tasks.py``, the loop over the tasks of a recipe; ``bench.py`` measures speed.
"""
