"""One run in several processes, as ``torchrun`` and ``accelerate launch`` start them.

Every process does the same work on its own share of each step's windows; only rank 0 writes files and prints. All
processes see the same folder. Nothing here needs torch before ``begin``.
"""

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from qtool.system.errors import InputError

if TYPE_CHECKING:
    import torch

# timeout of collectives: the other ranks wait while rank 0 writes calibration text or the checkpoint
PATIENCE = timedelta(hours=24)
REQUESTS = {  # kinds of sharding that accelerate launch may ask for, by its environment variable
    "FSDP": "fully sharded training",
    "DEEPSPEED": "DeepSpeed",
    "MEGATRON_LM": "Megatron-LM",
}


def world_size() -> int:
    """Return the world size, the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_first() -> bool:
    """Return whether this process has rank 0, which writes files and prints."""
    return rank() == 0


def start(device: "torch.device") -> None:
    """Initialise the process group; do nothing if there is only one process.

    Raises:
        InputError: The launcher asks for a kind of sharding, which only the recipe can choose.
    """
    for name, what in REQUESTS.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise InputError(
                f"accelerate launch is configured for {what}, which qtool does not use; turn it off there, and set "
                "sharding: full in the recipe"
            )
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def active() -> bool:
    """Return whether a process group is initialised."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and bool(distributed.is_initialized())


def barrier() -> None:
    """Wait until every process has called this function (a barrier)."""
    if active():
        import torch.distributed

        torch.distributed.barrier()


def all_reduce_mean(*tensors: "torch.Tensor") -> None:
    """Replace each tensor by its mean over all processes (an all-reduce)."""
    if not active():
        return
    from torch import distributed

    works = [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
    for tensor, work in zip(tensors, works, strict=True):
        work.wait()
        tensor.div_(world_size())


def all_reduce_sum(tensor: "torch.Tensor") -> "torch.Tensor":
    """Replace a tensor by its sum over all processes (an all-reduce), and return it."""
    if active():
        import torch.distributed

        torch.distributed.all_reduce(tensor)
    return tensor


def local_shard(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return the local shard of a DTensor, sharing its memory; return any other tensor unchanged."""
    sharded: Any = sys.modules.get("torch.distributed.tensor")
    if sharded is None or not isinstance(tensor, sharded.DTensor):
        return tensor
    held: torch.Tensor = tensor.to_local()
    return held.detach()


def finish() -> None:
    """Destroy the process group: from now on each process works alone, or ends."""
    if active():
        import torch.distributed

        torch.distributed.destroy_process_group()
