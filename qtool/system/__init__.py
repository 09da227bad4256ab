"""The ground floor: errors, progress, memory, processes, locks, energy, versions. Knows nothing of quantization.

May import no other room. Begin with ``errors.py`` and ``progress.py``.
"""
