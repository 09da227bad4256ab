"""One run in several processes, as ``torchrun`` and ``accelerate launch`` start them.

Every process does the same work on its own share of the windows, of the rows of a weight or of the experts of a layer;
only rank 0 writes files and prints. All processes see the same folder. A function that all processes must call, in the
same order, says so. Nothing here needs torch before ``start``.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from qtool.system.errors import InputError, RunError

if TYPE_CHECKING:
    import torch

# timeout of collectives: the other ranks wait while rank 0 writes calibration text or the checkpoint
PATIENCE = timedelta(hours=24)
REQUESTS = {  # kinds of sharding that accelerate launch may ask for, by its environment variable
    "FSDP": "fully sharded training",
    "DEEPSPEED": "DeepSpeed",
    "MEGATRON_LM": "Megatron-LM",
}

T = TypeVar("T")
_alone = 0  # number of ``with alone()`` blocks that this process is in


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
        InputError: The launcher asks for a kind of sharding, which only the recipe can choose, or processes would share
            a GPU.
    """
    for name, what in REQUESTS.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise InputError(
                f"accelerate launch is configured for {what}, which qtool does not use; turn it off there, and set "
                "sharding: full in the recipe"
            )
    if world_size() > 1:
        _check_own(device)
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def _check_own(device: "torch.device") -> None:
    """Check that each process of this machine has a GPU of its own, if ``device`` is one."""
    if device.type != "cuda":
        return
    import torch

    if device.index is not None:
        raise InputError(
            f"model.device: {device} is one GPU, and {world_size()} processes were started; use cuda, and each process "
            "takes the GPU of its local rank"
        )
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        raise InputError(
            f"this machine has {found} GPU(s), and more processes were started on it; use torchrun --nproc-per-node "
            f"{found}, or set model.device: cpu"
        )


def active() -> bool:
    """Return whether a process group is initialised, and this process works with the others."""
    distributed: Any = sys.modules.get("torch.distributed")
    found = distributed is not None and distributed.is_available() and bool(distributed.is_initialized())
    return found and not _alone


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself inside the ``with`` block: the functions that all processes call do nothing."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def place() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that it shares work with; (0, 1) if it is alone."""
    return (rank(), world_size()) if active() else (0, 1)


def barrier() -> None:
    """Wait until every process has called this function (a barrier)."""
    if active():
        import torch.distributed

        torch.distributed.barrier()


def all_reduce_mean(*tensors: "torch.Tensor") -> None:
    """Replace each tensor by its mean over all processes (an all-reduce)."""
    if active():
        sum_all(tensors)
        for tensor in tensors:
            tensor.div_(world_size())


def all_reduce_sum(tensor: "torch.Tensor") -> "torch.Tensor":
    """Replace a tensor by its sum over all processes (an all-reduce), and return it."""
    if active():
        import torch.distributed

        torch.distributed.all_reduce(tensor)
    return tensor


def sum_all(tensors: Sequence["torch.Tensor"]) -> None:
    """Replace each tensor by its sum over all processes; all of them have tensors of the same shapes."""
    if not active():
        return
    from torch import distributed

    works = [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in works:
        work.wait()


def all_reduce_max(tensor: "torch.Tensor") -> "torch.Tensor":
    """Replace a tensor by its largest values over all processes, and return it."""
    if active():
        from torch import distributed

        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


def summed(*values: float) -> list[float]:
    """Return the sum of each value over all processes, in float64."""
    if not active():
        return list(values)
    found: list[float] = all_reduce_sum(_numbers(values)).tolist()
    return found


def lowest(value: int) -> int:
    """Return the lowest ``value`` over all processes."""
    return -int(all_reduce_max(_numbers([-value]))) if active() else value


def pool(count: int, *means: "torch.Tensor") -> int:
    """Replace means over ``count`` rows by the means over the rows of all processes, and return their number."""
    (total,) = summed(count)
    if active():
        for mean in means:
            mean.mul_(count / max(total, 1))
        sum_all(means)
    return int(total)


def reduce_sum(tensor: "torch.Tensor", to: int) -> None:
    """Replace a tensor of the process ``to`` by its sum over all processes; that of others has no meaning then."""
    if active():
        import torch.distributed

        torch.distributed.reduce(tensor, to)


def joined(part: "torch.Tensor", sizes: Sequence[int]) -> "torch.Tensor":
    """Return the rows of all processes in the order of their ranks.

    ``part`` are the rows of this process; ``sizes`` has the number of rows of each. Each process sends its own bytes
    once, whatever the dtype.
    """
    if not active():
        return part
    import torch

    whole = part.new_empty(sum(sizes), *part.shape[1:], device=_device(part.device))
    for number, rows in enumerate(whole.split(list(sizes))):
        if number == rank():
            rows.copy_(part)
        if rows.numel():
            torch.distributed.broadcast(rows.view(torch.uint8), number)
    return whole.to(part.device)


def of_first(make: Callable[[], T]) -> T:
    """Return what ``make`` returns in the first process; the others do not call it."""
    if not active():
        return make()
    import torch.distributed

    found: list[Any] = [make() if is_first() else None]
    torch.distributed.broadcast_object_list(found)
    made: T = found[0]
    return made


def check_equal(digest: bytes, what: str) -> None:
    """Check that ``digest`` is the same in all processes; ``what`` names its subject in the message.

    Raises:
        RunError: it is not.
    """
    if not active():
        return
    import torch.distributed

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, digest)
    others = [number for number, each in enumerate(found) if each != found[0]]
    if others:
        raise RunError(
            f"{what} is not the same in all processes: rank(s) {', '.join(map(str, others))} of {world_size()} differ "
            "from rank 0; all need the same machine type, software and model files. Finished blocks are kept"
        )


def _numbers(values: Sequence[float]) -> "torch.Tensor":
    """Return numbers in float64 where the process group can add them up."""
    import torch

    return torch.tensor(values, dtype=torch.float64, device=_device(torch.device("cpu")))


def _device(device: "torch.device") -> "torch.device":
    """Return ``device``, or this process's GPU if the process group serves nothing else."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.distributed.get_backend() == "nccl" else device


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
