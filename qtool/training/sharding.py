"""Sharded training: torch's own ``fully_shard`` (FSDP2) splits the model over the processes.

Each decoder block is a unit, and so is the rest of the model. Every process holds a shard of each tensor of a unit, and
gathers the whole unit only while it computes with it: in the forward and in the backward pass. Frozen tensors are
sharded as well: weights of few bits, which are buffers otherwise, and the float model that the loss compares with.
``fit.fit`` moves the local shards, so gradients, optimizer states and the best state are sharded too.

Blocks are made, sharded and at last packed one by one. No process ever holds all float32 weights.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from qtool.blocks.job import Job
from qtool.config.training import EndToEndConfig
from qtool.models.linears import decoder_blocks, packed_weights
from qtool.quant.packed_weight import PackedWeight
from qtool.quant.trained_linear import QuantLinear
from qtool.system import distributed
from qtool.system.errors import InputError
from qtool.training.fit import FitResult, ParamGroup

if TYPE_CHECKING:  # builds of torch without torch.distributed lack it
    from torch.distributed.fsdp import FSDPModule


def check(config: EndToEndConfig) -> None:
    """Refuse ``sharding: full`` in a single process.

    Raises:
        InputError: The model is to be sharded, and there is only one process.
    """
    if config.sharding == "full" and distributed.world_size() == 1:
        raise InputError(
            "sharding: full splits the model over processes, and this is the only one; start more with torchrun "
            "--nproc-per-node N -m qtool, or set sharding: none"
        )


def train_by_block(
    job: Job,
    teacher: nn.Module | None,
    config: EndToEndConfig,
    make: Callable[[int], list[ParamGroup]],
    train: Callable[[list[ParamGroup]], FitResult],
    pack: Callable[[int], None],
) -> FitResult:
    """Make the layers that train in each block, train all of them, and pack each block; a head is one more block.

    ``make(index)`` puts layers into a block of the job's model and returns their parameters that train, and
    ``pack(index)`` replaces these layers by packed ones. With ``sharding: full`` the parameters given to ``train`` are
    sharded, and ``pack`` finds a model with empty parameters: only the layers of ``make`` have weights.

    Raises:
        InputError: The model is to be sharded, and there is only one process.
    """
    check(config)
    if config.sharding == "none":
        found = train([group for index in range(job.num_parts) for group in make(index)])
        for index in range(job.num_parts):
            pack(index)
        return found
    shards = _Shards(job, teacher)
    found = train(shards.split(make))
    shards.gather(pack)
    return found


class _Shards:
    """This process's shards of a student and its teacher."""

    def __init__(self, job: Job, teacher: nn.Module | None) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.loaded = loaded = job.loaded
        self.outside = range(len(loaded.blocks()), job.num_parts)  # a head, which is sharded with the rest
        self.student: nn.Module = loaded.model
        self.names = [name for name, _ in loaded.blocks()]
        self.models = [self.student, *([] if teacher is None else [teacher])]
        self.units = list(zip(*(decoder_blocks(model)[1] for model in self.models), strict=True))
        self.mesh = init_device_mesh(loaded.device.type, (distributed.world_size(),))
        self.hollow = _hollow(loaded.model)

    def split(self, make: Callable[[int], list[ParamGroup]]) -> list[ParamGroup]:
        """Make and shard one block after the other, of both models, then the rest; return the parameters that train."""
        groups = []
        for index, unit in enumerate(self.units):
            for block in unit:
                block.to(self.loaded.device)
            before = [parameter for block in unit for parameter in block.parameters()]
            groups += self._split_made(make(index), unit, before)
        before = [p for p in self.student.parameters() if distributed.local_shard(p) is p] if self.outside else []
        rest = [group for index in self.outside for group in make(index)]
        return groups + self._split_made(rest, self.models, before)

    def _split_made(
        self, made: list[ParamGroup], modules: Sequence[nn.Module], before: list[nn.Parameter]
    ) -> list[ParamGroup]:
        """Shard ``modules``, the student's first, and return the parameters ``made`` there as they are then."""
        student = modules[0]
        _freeze_buffers(student)
        names = {parameter: name for name, parameter in student.named_parameters()}
        self._split(modules, before)
        return [
            group._replace(parameters=[student.get_parameter(names[parameter]) for parameter in group.parameters])
            for group in made
        ]

    def _split(self, modules: Sequence[nn.Module], before: list[nn.Parameter]) -> None:
        """Shard the whole tensors of ``modules``, and free their memory and that of the parameters ``before``.

        Memory is freed by emptying the tensors: the two models share some, and callers still hold replaced modules.
        """
        from torch.distributed.fsdp import fully_shard

        whole = {p for module in modules for p in module.parameters() if distributed.local_shard(p) is p and p.dim()}
        for parameter in whole:
            parameter.data = parameter.data.contiguous()
        for module in modules:
            single = {parameter for parameter in module.parameters() if not parameter.dim()}  # cannot be sharded
            for parameter in single:
                parameter.data = parameter.data.to(self.loaded.device)
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, ignored_params=single)
        for parameter in whole.union(p for p in before if p.dim()):
            parameter.data = parameter.new_empty(0)

    @torch.no_grad()
    def gather(self, pack: Callable[[int], None]) -> None:
        """Gather the packed model: block by block, then the rest."""
        self.loaded.model = self.hollow
        for index, (unit, name) in enumerate(zip(self.units, self.names, strict=True)):
            self._fill(self.hollow.get_submodule(name), unit[0], partial(pack, index))
        self._fill(self.hollow, self.student, lambda: list(map(pack, self.outside)))

    def _fill(self, hollow: nn.Module, unit: nn.Module, pack: Callable[[], object]) -> None:
        """Fill the empty parameters of ``hollow`` from ``unit``; ``pack`` is called while the unit is gathered."""
        whole = cast("FSDPModule", unit)
        whole.unshard()
        pack()
        sharded = dict(unit.named_parameters())
        frozen = [(name, buffer) for name, buffer in hollow.named_buffers() if name in sharded]  # ``_freeze_buffers``
        for name, tensor in [*hollow.named_parameters(), *frozen]:
            if not tensor.numel():
                tensor.data = sharded[name].detach().clone()
        whole.reshard()


def _hollow(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of ``model`` with empty parameters and packed weights; tied tensors stay tied."""
    packed = [buffer for layer in packed_weights(model).values() for buffer in layer.buffers() if buffer.dim() == 2]
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    memo |= {id(buffer): buffer.new_empty(0) for buffer in packed}
    memo |= {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _freeze_buffers(block: nn.Module) -> None:
    """Turn the buffers of linears that are matrices (packed codes, scales) into parameters, which FSDP2 can shard."""
    for layer in block.modules():
        if isinstance(layer, QuantLinear | PackedWeight):
            for module in layer.modules():
                for name, buffer in list(module.named_buffers(recurse=False)):
                    if buffer.dim() == 2:
                        delattr(module, name)
                        module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
