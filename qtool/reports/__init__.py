"""Reports: measured numbers as records, text, HTML pages, figures and model cards.

Pure data in, text and pictures out: knows no torch, no model and no checkpoint; may import ``config`` and ``system``.
Begin with ``records.py`` (the numbers) and ``report.py`` (one run's report); ``comparison.py`` is ``qtool compare``.
"""
