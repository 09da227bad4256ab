"""Shared parts of methods that train linears in place: replacing them, their start, learning rates, and packing."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from qtool.blocks.job import Job, Method, Result
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantSpec
from qtool.config.training import EndToEnd, GridConfig, WeightsConfig
from qtool.models.folders import resolve
from qtool.models.linears import Target, packed_linears, replace_linear
from qtool.models.loaded import LoadedModel
from qtool.models.tables import table_keys
from qtool.quant.affine import QuantizedWeight, relative_error
from qtool.quant.packed_embedding import PackedEmbedding
from qtool.quant.trained_linear import POSITIVE, QuantLinear
from qtool.system.errors import InputError
from qtool.training.end_to_end import train_model
from qtool.training.fit import FitResult, ParamGroup
from qtool.training.losses import CE
from qtool.training.plan import plan_of
from qtool.training.rates import START_MARGIN, end_to_end_total, ends_to_scale, of_depth, rate, scale_group
from qtool.training.sharding import train_by_block

L = TypeVar("L", bound=QuantLinear)


def put_linears(model: nn.Module, targets: Iterable[Target], make: Callable[[Target], L]) -> dict[str, L]:
    """Put ``make(target)`` in the place of each target of ``model``; return these layers by name."""
    layers = {}
    for target in targets:
        layers[target.name] = make(target)
        replace_linear(model, target.name, layers[target.name])
    return layers


def pack_linears(model: nn.Module, layers: dict[str, L]) -> None:
    """Replace ``layers`` by packed layers with the same weights, bit for bit."""
    for name, layer in layers.items():
        replace_linear(model, name, layer.freeze())


def _difference(found: QuantSpec, asked: QuantSpec) -> str:
    """Return a sentence that names the keys of ``quant`` in which two grids differ, but for the signs of scales."""
    theirs, ours = (spec.any_sign.model_dump(mode="json") for spec in (found, asked))
    keys = [key for key, value in theirs.items() if value != ours[key]]
    said = [" and ".join(f"{key}: {json.dumps(values[key])}" for key in keys) for values in (theirs, ours)]
    return f"the checkpoint has {said[0]}, the recipe {said[1]}, and these must be the same"


class Start:
    """A native checkpoint from which a training starts instead of the float weights, opened and checked."""

    def __init__(self, folder: str, job: Job) -> None:
        """Open the checkpoint and compare its linears and tables, their grids and shapes with those of ``job``.

        Raises:
            InputError: They differ, or ``folder`` is not a native checkpoint.
        """
        self.source = NativeCheckpoint(resolve(folder, key="method.init_from"))
        asked = {target.name: target for target in (*job.tables.embeddings, *job.targets)}
        found, wrong = self.source.specs, f"method.init_from: {folder} does not fit: "
        if asked.keys() != found.keys():
            odd = min(asked.keys() ^ found.keys())
            where = "only the recipe quantizes" if odd in asked else "the recipe leaves in floating point"
            kind = {"quant.embedding": "an embedding", "quant.head": "the output head"}
            key = table_keys(job.loaded.model).get(odd, "")
            has = found[odd].label() if odd in found else "float"
            hint = f"; the checkpoint has it as {has}, and {key} must be the same" if key else ""
            raise InputError(f"{wrong}{odd} is {kind.get(key, 'a linear')} that {where}{hint}")
        for name, target in asked.items():
            if found[name].any_sign != target.spec.any_sign:
                raise InputError(
                    f"method.init_from: {folder} has {name} on {found[name].label()}, the recipe asks for "
                    f"{target.spec.label()}; {_difference(found[name], target.spec)}"
                )
            if (shape := tuple(self.source.tensor(f"{name}.weight_shape").tolist())) != target.weight_shape:
                raise InputError(
                    f"method.init_from: {folder} has {name} of shape {shape}, the model {target.weight_shape}"
                )
            if found[name].signed and not target.spec.signed and bool((self.source.quantized(name).scale < 0).any()):
                raise InputError(f"method.init_from: {folder} has negative scales in {name}, {POSITIVE}")
        if (tied := dict(self.source.tables.tied)) != dict(job.tables.tied):
            raise InputError(f"{wrong}its tied heads are {tied or 'none'}, those of the model {dict(job.tables.tied)}")

    def take_embeddings(self, job: Job) -> dict[str, float]:
        """Put the checkpoint's codes into the packed embeddings of ``job``; return the error of each by name."""
        errors = {}
        for target in job.tables.embeddings:
            layer, stored = job.loaded.model.get_submodule(target.name), self.source.quantized(target.name)
            assert isinstance(layer, PackedEmbedding)
            device = layer.weight.device
            codes, scale, zero_point = (part.to(device) for part in stored[:3])
            quantized = QuantizedWeight(codes, scale, zero_point, stored.spec)
            errors[target.name] = relative_error(target.stored_weight.to(device), quantized)
            layer.fill(quantized)
        return errors

    def take_floats(self, loaded: LoadedModel, within: str = "") -> None:
        """Copy the checkpoint's tensors that are not quantized (norms, biases) into ``loaded``.

        Only names that start with ``within`` are copied. The linears of ``loaded`` must not be replaced yet. Parameters
        are replaced and not changed in place, because a teacher may share them.
        """
        for name in self.source.float_names():
            if name.startswith(within):
                path, _, attribute = name.rpartition(".")
                module = loaded.model.get_submodule(path)
                own = getattr(module, attribute)
                value = self.source.tensor(name).to(own).clone()
                if not torch.equal(value, own):
                    setattr(module, attribute, nn.Parameter(value, requires_grad=False))

    def take_codes(self, layers: dict[str, L], margin: float = 0.0) -> None:
        """Start each of ``layers`` at the checkpoint's codes, ``margin`` from the edges of their cells, in codes."""
        for name, layer in layers.items():
            layer.start_from(self.source.quantized(name), margin)


C = TypeVar("C", bound=EndToEnd)


def weight_group(layer: QuantLinear, config: WeightsConfig, total: float) -> ParamGroup:
    """Return the weights of ``layer`` with their learning rate; distances are divided by ``total``."""
    step = float(layer.qparams()[0].detach().abs().mean())
    return ParamGroup([layer.weight], rate(config.travel * step, total, config.lr), config.weight_decay)


def grid_groups(layer: QuantLinear, config: GridConfig, total: float) -> list[ParamGroup]:
    """Return the weights, scales and, if they train, zero points of ``layer`` with their learning rates."""
    share = ends_to_scale(config.scale_travel, layer.spec.qmax)
    groups = [weight_group(layer, config, total), scale_group(layer.scale, share, total, config.scale_lr)]
    if layer.zero_point.requires_grad:
        groups.append(ParamGroup([layer.zero_point], rate(config.scale_travel, total, config.scale_lr)))
    return groups


def train_linears(
    job: Job,
    config: C,
    make: Callable[[Target, C], L],
    groups_of: Callable[[L, C, float], list[ParamGroup]],
) -> Result:
    """Train a layer in the place of each target on the text of the job, all layers at once, and pack them.

    ``groups_of(layer, config, total)`` returns the parameters of a layer with their learning rates; distances are
    divided by ``total``, see ``rates.end_to_end_total``.
    """
    loaded = job.loaded
    num_blocks = len(loaded.blocks())
    total = end_to_end_total(plan_of(config, len(job.text)).total, num_blocks)
    loaded.gather(on_device=config.sharding == "none")
    start = None if config.init_from is None else Start(config.init_from, job)
    teacher = None if config.loss == CE else loaded.float_copy()
    if start is not None:
        start.take_embeddings(job)
        start.take_floats(loaded)
    layers: list[dict[str, L]] = []

    def put(index: int) -> list[ParamGroup]:
        layers.append(put_linears(loaded.model, job.of_block(index), lambda target: make(target, config)))
        if start is not None:
            start.take_codes(layers[index], of_depth(START_MARGIN, num_blocks))
        return [group for layer in layers[index].values() for group in groups_of(layer, config, total)]

    def train(groups: list[ParamGroup]) -> FitResult:
        return train_model(job, teacher, groups, config, phase="training")

    def pack(index: int) -> None:
        pack_linears(loaded.model, layers[index])

    found = train_by_block(job, teacher, config, put, train, pack)
    for layer in packed_linears(loaded.model).values():
        layer.mark(loaded.dtype)  # the weights that trained were float32
    return Result(found.series("loss"), {})


def trained_method(
    command: str,
    summary: str,
    config: type[C],
    make: Callable[[Target, C], L],
    groups_of: Callable[[L, C, float], list[ParamGroup]],
) -> Method[C]:
    """Return the method that trains ``make(target, config)`` in the place of each target, end to end."""
    run = partial(train_linears, make=make, groups_of=groups_of)
    return Method(command, summary, config, run, end_to_end=lambda config: True)
