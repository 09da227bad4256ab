"""Reports: measured numbers as records, text, HTML pages, figures and model cards.

Pure data in, text and pictures out: this room knows no torch, no model and no checkpoint, and imports only ``config``
and ``system``. Begin with ``records.py`` (the numbers), ``report.py`` (the report of one run) and ``document.py`` (how
any report is printed); ``comparison.py`` is ``qtool compare``.
"""
