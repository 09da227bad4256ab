"""The command line: commands, help texts, printed results, progress and exit codes.

May import every other room, but at module level only ``system`` and itself, so that ``--help`` loads no torch.
Begin with ``app.py``: one function per command. ``main.py`` turns errors into messages and exit codes.
"""
