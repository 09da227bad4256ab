"""One run in several processes, as ``torchrun`` and ``accelerate launch`` start them.

All processes do the same on their own share of each step's windows; the first one alone writes files and talks. They
see the same folder. Nothing here needs torch before ``begin``.
"""

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from qtool.system.errors import InputError

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(hours=24)  # with the first process: it may write calibration text or the checkpoint meanwhile
REQUESTS = {"FSDP": "fully sharded training", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def number() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """Whether this process writes and talks."""
    return number() == 0


def begin(device: "torch.device") -> None:
    """Let the processes find each other; alone, nothing happens.

    Raises:
        InputError: the launcher asks for a kind of sharding that is not its to choose.
    """
    for name, what in REQUESTS.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise InputError(
                f"accelerate launch was asked for {what}, which would not be done; configure it without, and use the "
                "recipe's sharding: full"
            )
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def active() -> bool:
    """Whether there are other processes to talk to now."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and bool(distributed.is_initialized())


def wait() -> None:
    """Go on when every process has come here."""
    if active():
        import torch.distributed

        torch.distributed.barrier()


def average(*tensors: "torch.Tensor") -> None:
    """Replace each tensor by its mean over all processes."""
    if not active():
        return
    from torch import distributed

    works = [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
    for tensor, work in zip(tensors, works, strict=True):
        work.wait()
        tensor.div_(count())


def total(tensor: "torch.Tensor") -> "torch.Tensor":
    """The sum of a tensor over all processes."""
    if active():
        import torch.distributed

        torch.distributed.all_reduce(tensor)
    return tensor


def part(tensor: "torch.Tensor") -> "torch.Tensor":
    """What this process holds of a tensor that is split over all, in the same memory; of any other, the tensor."""
    sharded: Any = sys.modules.get("torch.distributed.tensor")
    if sharded is None or not isinstance(tensor, sharded.DTensor):
        return tensor
    held: torch.Tensor = tensor.to_local()
    return held.detach()


def end() -> None:
    """Part from the others: each process goes on alone, or ends."""
    if active():
        import torch.distributed

        torch.distributed.destroy_process_group()
