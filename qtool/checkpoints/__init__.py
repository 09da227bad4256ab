"""Native checkpoints: tensor names, files, hashes, sizes, and the hook that lets transformers read them.

May import ``models``, ``quant``, ``config`` and ``system``.
Begin with ``native.py``, which writes and reads a checkpoint; ``files.py`` has the safetensors files,
``output_folder.py`` the folder that appears under its name only when it is complete.
"""
