"""How a model's next token is chosen, from ``generation_config.json``, in the metadata that llama.cpp takes it from."""

from pathlib import Path
from typing import Any

from qtool.system.reading import read_object

# key of generation_config.json -> method of gguf.GGUFWriter; each means the same in both
WRITTEN = {
    "temperature": "add_sampling_temp",
    "top_k": "add_sampling_top_k",
    "top_p": "add_sampling_top_p",
    "min_p": "add_sampling_min_p",
}


def add(writer: Any, folder: Path) -> None:  # Any: the gguf package is optional
    """Write what the generation config of ``folder`` says, if there is one, to ``writer``, a ``gguf.GGUFWriter``."""
    try:
        config = read_object(folder / "generation_config.json")
    except FileNotFoundError:
        return
    for key, method in WRITTEN.items():
        value = config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            getattr(writer, method)(int(value) if key == "top_k" else float(value))
