"""The name of a torch dtype, and sizes that depend on the device."""

from collections.abc import Mapping

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def size_for(device: torch.device, sizes: Mapping[str, int]) -> int:
    """Return the entry of ``sizes`` for the type of ``device``, or that of ``cpu`` if the type has none."""
    return sizes.get(device.type, sizes["cpu"])
