"""The ground: errors, progress, memory, processes, locks, energy, the environment. Knows nothing of quantization.

May import no other room. Begin with ``errors.py`` and ``progress.py``.
"""
