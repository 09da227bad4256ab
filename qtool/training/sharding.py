"""Training with the model split over the processes that share it: torch's own ``fully_shard`` (FSDP2).

Each decoder block is a unit, and so is the rest of the model. Every process holds a part of each tensor of a unit, and
the whole unit only while it computes with it: forward, and again when gradients are taken. What is frozen is split as
well: weights of few bits, which are buffers elsewhere, and the float model that the loss compares with. ``train.fit``
moves the parts that its process holds, so gradients, moments and the best state are parts too.

Blocks are made, split and at last packed one by one. No process ever holds all float32 weights.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from qtool.config.training import EndToEndConfig
from qtool.models.linears import decoder_blocks, packed_linears
from qtool.models.loaded import LoadedModel
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.trained_linear import QuantLinear
from qtool.system import distributed
from qtool.system.errors import InputError
from qtool.training.fit import FitResult, ParamGroup

if TYPE_CHECKING:  # some builds of torch are for one process only
    from torch.distributed.fsdp import FSDPModule


def check(config: EndToEndConfig) -> None:
    """Whether there is anything to split the model over.

    Raises:
        InputError: this process is alone.
    """
    if config.sharding == "full" and distributed.world_size() == 1:
        raise InputError(
            "sharding: full splits the model over processes, and this is the only one; start more with torchrun "
            "--nproc-per-node N -m qtool, or set sharding: none"
        )


def train_by_block(
    loaded: LoadedModel,
    teacher: nn.Module | None,
    config: EndToEndConfig,
    make: Callable[[int], list[ParamGroup]],
    train: Callable[[list[ParamGroup]], FitResult],
    pack: Callable[[int], None],
) -> FitResult:
    """Make what trains in each block, train all of it, and pack each block.

    ``make(index)`` puts layers into a block of ``loaded.model`` and says what trains of them; ``pack(index)`` puts
    packed ones into their places. With ``sharding: full`` the parameters that ``train`` is given are split, and
    ``pack`` finds ``loaded.model`` with nothing in the places of what was trained.

    Raises:
        InputError: the model is to be split, and this process is alone.
    """
    check(config)
    num_blocks = len(loaded.blocks())
    if config.sharding == "none":
        found = train([group for index in range(num_blocks) for group in make(index)])
        for index in range(num_blocks):
            pack(index)
        return found
    shards = _Shards(loaded, teacher)
    found = train(shards.split(make))
    shards.gather(pack)
    return found


class _Shards:
    """This process's parts of a student and its teacher."""

    def __init__(self, loaded: LoadedModel, teacher: nn.Module | None) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.loaded = loaded
        self.student: nn.Module = loaded.model
        self.names = [name for name, _ in loaded.blocks()]
        self.models = [self.student, *([] if teacher is None else [teacher])]
        self.units = list(zip(*(decoder_blocks(model)[1] for model in self.models), strict=True))
        self.mesh = init_device_mesh(loaded.device.type, (distributed.world_size(),))
        self.hollow = _hollow(loaded.model)

    def split(self, make: Callable[[int], list[ParamGroup]]) -> list[ParamGroup]:
        """Make and split one block after the other, of both models, then the rest; returns what trains."""
        groups = []
        for index, unit in enumerate(self.units):
            for block in unit:
                block.to(self.loaded.device)
            before = [parameter for block in unit for parameter in block.parameters()]
            made = make(index)
            student = unit[0]
            _freeze_buffers(student)
            names = {parameter: name for name, parameter in student.named_parameters()}
            self._split(unit, before)
            for group in made:
                parameters = [student.get_parameter(names[parameter]) for parameter in group.parameters]
                groups.append(group._replace(parameters=parameters))
        self._split(self.models, [])
        return groups

    def _split(self, modules: list[nn.Module] | tuple[nn.Module, ...], before: list[nn.Parameter]) -> None:
        """Split what is whole in ``modules``, and let go of the whole tensors and those that were there ``before``.

        The two models share tensors, and others still hold the modules that were replaced.
        """
        from torch.distributed.fsdp import fully_shard

        whole = {p for module in modules for p in module.parameters() if distributed.local_shard(p) is p and p.dim()}
        for parameter in whole:
            parameter.data = parameter.data.contiguous()
        for module in modules:
            single = {parameter for parameter in module.parameters() if not parameter.dim()}  # cannot be split
            for parameter in single:
                parameter.data = parameter.data.to(self.loaded.device)
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, ignored_params=single)
        for parameter in whole.union(p for p in before if p.dim()):
            parameter.data = parameter.new_empty(0)

    @torch.no_grad()
    def gather(self, pack: Callable[[int], None]) -> None:
        """Put the model together again, packed: block by block, then the rest."""
        self.loaded.model = self.hollow
        for index, (unit, name) in enumerate(zip(self.units, self.names, strict=True)):
            self._fill(self.hollow.get_submodule(name), unit[0], partial(pack, index))
        self._fill(self.hollow, self.student, lambda: None)

    def _fill(self, hollow: nn.Module, unit: nn.Module, pack: Callable[[], None]) -> None:
        """Fill ``hollow`` from ``unit``, but for what ``pack`` puts into it while the unit is whole."""
        whole = cast("FSDPModule", unit)
        whole.unshard()
        pack()
        for name, parameter in hollow.named_parameters():
            if not parameter.numel():
                parameter.data = unit.get_parameter(name).detach().clone()
        whole.reshard()


def _hollow(model: PreTrainedModel) -> PreTrainedModel:
    """The modules of ``model`` with nothing in its parameters and packed weights; what was tied stays so."""
    packed = [buffer for layer in packed_linears(model).values() for buffer in layer.buffers()]
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    memo |= {id(buffer): buffer.new_empty(0) for buffer in packed}
    memo |= {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _freeze_buffers(block: nn.Module) -> None:
    """Make the frozen matrices of linears parameters, for only those are split: packed codes, positions, scales."""
    for layer in block.modules():
        if isinstance(layer, QuantLinear | PackedLinear):
            for module in layer.modules():
                for name, buffer in list(module.named_buffers(recurse=False)):
                    if buffer.dim() == 2:
                        delattr(module, name)
                        module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
