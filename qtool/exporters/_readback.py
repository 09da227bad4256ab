"""Reading exports: an export is compared with its checkpoint before it gets its name, and ``qtool eval`` loads exports.

The readers share no code with the writers. They also read the folders of other tools, so that ``qtool eval`` measures
an export without its engine being installed.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qtool.checkpoints import written_config
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import ActivationGrid
from qtool.config.sections import ModelConfig
from qtool.exporters._activations import round_inputs
from qtool.exporters._base import Exporter, recognised
from qtool.exporters._folder import (
    WrittenFolder,
    has_class,
    head_names,
    published_names,
    row_parts,
    skeleton,
    write_folder,
)
from qtool.exporters._published import Place, published
from qtool.models.expanded import put_float
from qtool.models.folders import read_config, resolve
from qtool.models.linears import packed_weights
from qtool.models.loaded import LoadedModel
from qtool.models.loading import choose_device, compute_dtype, load_model
from qtool.models.quantized_sources import is_expandable
from qtool.quant.affine import QuantizedWeight, dequantize
from qtool.system.errors import InputError, RunError, first_line
from qtool.system.scratch import temporary_folder
from qtool.system.tensors import dtype_name

TOLERANCE = 1e-5  # largest difference of logits, relative to the largest logit: equal weights, sums in another order
ENGINE_TOLERANCE = 1e-4  # largest difference of an engine's logits; its softmax and sigmoid are its own code too


@torch.no_grad()
def read_back(source: NativeCheckpoint, out: Path, exporter: Exporter, *, may_round: bool) -> dict[str, float | None]:
    """Compare every tensor, the config and the logits of fixed random tokens; return the largest differences.

    That of logits is ``None`` where transformers has no class for the model. With ``may_round``, differences of tensors
    and logits are only returned: the user asked for a dtype that does not hold the weights exactly.

    Raises:
        RunError: a tensor, a key of the config or the logits differ; the message names the first difference.
    """
    loaded = None
    if has_class(source):
        loaded = load_model(ModelConfig(path=str(source.folder), dtype="float32", device="cpu"), quantized=True)
        probe = torch.randint(loaded.model.config.get_text_config().vocab_size, (1, 32), generator=_seeded())
        ours = loaded.model(probe, use_cache=False).logits
    worst = 0.0
    opened = exporter.open(out)
    names = published_names(source)
    places = exporter.places(names)
    layers = {} if loaded is None else packed_weights(loaded.model)
    for name in layers or source.specs:
        expected = source.quantized(name)
        weight = _read(opened, exporter, name, expected.codes.shape[1], names.rows, places)
        difference = _difference(weight, expected)
        worst = max(worst, difference)
        if not may_round and difference != 0:
            raise RunError(f"{name} differs after export by up to {worst:.3g}; the export was not kept")
        grid = _rounding(opened, exporter, name, places)
        if grid != source.specs[name].activations:
            raise RunError(f"{name} rounds its input otherwise after export; the export was not kept")
        if loaded is not None:
            put_float(loaded.model, name, layers[name], weight)
            if grid is not None:
                round_inputs(loaded.model.get_submodule(name), grid)
    other = None if may_round else other_float(source, opened, exporter)
    if other is not None:
        raise RunError(f"{other} differs after export; the export was not kept")
    if (key := config_fault(opened, source, exporter.config_keys)) is not None:
        raise RunError(f"config.json differs after export, in {key}; the export was not kept")
    if loaded is None:
        return {"weight_difference": worst, "logit_difference": None}
    logits = float((loaded.model(probe, use_cache=False).logits - ours).abs().max() / ours.abs().max())
    if not may_round and not logits <= TOLERANCE:
        raise RunError(
            f"logits differ after export by {logits:.3g} of the largest logit, but at most {TOLERANCE:g} is allowed; "
            "the export was not kept"
        )
    if exporter.runs is not None:
        _run(exporter.runs, out, probe, ours)
    return {"weight_difference": worst, "logit_difference": logits}


def _run(runs: Callable[[Path, Tensor], Tensor], out: Path, probe: Tensor, ours: Tensor) -> None:
    """Let an engine compute the logits of ``probe``, and compare them with ``ours``.

    Raises:
        RunError: they differ by more than sums in another order do.
    """
    found = float((runs(out, probe) - ours).abs().max() / ours.abs().max())
    if not found <= ENGINE_TOLERANCE:
        raise RunError(
            f"the engine computes logits that differ by {found:.3g} of the largest logit, but at most "
            f"{ENGINE_TOLERANCE:g} is allowed; the export was not kept"
        )


def _difference(weight: Tensor, expected: QuantizedWeight) -> float:
    """Return the largest difference of ``weight`` ``[out, in]`` from a dequantized one; NaN if some number is NaN."""
    codes, scale, zero_point, spec = expected
    parts = [
        (weight[rows] - dequantize(codes[rows], scale[rows], zero_point[rows], spec)).abs().amax()
        for rows in row_parts(weight)
    ]
    return float(torch.stack(parts).amax())


def other_float(source: NativeCheckpoint, opened: WrittenFolder, exporter: Exporter) -> str | None:
    """Return the name of a tensor outside quantized weights that an export holds otherwise, or ``None``."""
    names = published_names(source)
    places = exporter.places(names)
    floats = {name: source.tensor(name) for name in source.float_names()}
    written = names.floats(floats, places)
    for key in written.keys() & {key for key, place in places.items() if source.specs.keys() & place.linears}:
        del written[key]  # it has rows of a quantized linear too
        for linear in places[key].linears.keys() - source.specs.keys():
            own = floats[f"{linear}.weight"].float()
            if not torch.equal(own, _read(opened, exporter, linear, own.shape[1], names.rows, places)):
                return linear
    return next((key for key, each in written.items() if not opened.same(key, each)), None)


def _read(
    opened: WrittenFolder,
    exporter: Exporter,
    linear: str,
    columns: int,
    sizes: Mapping[str, int],
    places: Mapping[str, Place],
) -> Tensor:
    """Read the weight ``[out, columns]`` of a linear from all places with rows of it; ``sizes`` are numbers of rows."""
    found: dict[str, Tensor] = {}
    for key, place in places.items():
        if linear in place.linears:
            rows = exporter.read(opened, key.removesuffix(".weight"))
            if rows.shape != (place.num_rows, columns):
                raise RunError(
                    f"{key} has shape {list(rows.shape)} after export, but {[place.num_rows, columns]} was expected; "
                    "the export was not kept"
                )
            place.scatter(rows, found, sizes)
    return found[linear]


def _rounding(
    opened: WrittenFolder, exporter: Exporter, linear: str, places: Mapping[str, Place]
) -> ActivationGrid | None:
    """Return the grid by which readers round the input of a linear, from all places with rows of it."""
    if exporter.rounds is None:
        return None
    keys = [key.removesuffix(".weight") for key, place in places.items() if linear in place.linears]
    found = {exporter.rounds(opened, key) for key in keys}
    if len(found) > 1:
        raise InputError(f"{opened.folder}: {' and '.join(keys)} are rows of {linear} and round one input differently")
    return found.pop()


def config_fault(opened: WrittenFolder, source: NativeCheckpoint, own: Collection[str]) -> str | None:
    """Return a key of the written config by which some reader computes another model, or ``None``.

    ``own`` are keys that the format adds. Older keys may be added too, but must say the same; and a head in the files
    is used only by a config that does not tie it to the embedding.
    """
    theirs, mine = opened.config, source.config
    if (key := written_config.difference(theirs, mine, ("quantization_config", *own))) is not None:
        return key
    readings = written_config.reading(theirs) or {}, written_config.reading(mine) or {}
    if (key := written_config.difference(*readings, own, ("dtype", "tie_word_embeddings"))) is not None:
        return key
    added = written_config.misread(theirs)
    if added is not None and written_config.misread(mine) is None:
        return added
    tied = theirs.get("tie_word_embeddings") and not head_names(opened.folder).isdisjoint(opened.names())
    return "tie_word_embeddings" if tied else None


def load_exported(config: ModelConfig) -> LoadedModel | None:
    """Load an exported folder as a float model with expanded weights; return ``None`` if no format recognises it.

    Raises:
        InputError: the folder is damaged, or holds what the format does not have.
    """
    folder = resolve(config.path)
    exporter = recognised(folder)
    if exporter is None or is_expandable(read_config(folder)):  # the second is a source, which load_model reads
        return None
    try:
        return _expanded(config, folder, exporter)
    except (OSError, InputError, RunError):
        raise
    except Exception as error:  # a config or tensors of any other form; read_back shows errors of our own code
        raise InputError(
            f"{config.path} is damaged, or no export of its format: {type(error).__name__}: {first_line(error)}"
        ) from error


def _expanded(config: ModelConfig, folder: Path, exporter: Exporter) -> LoadedModel:
    """Load the folder of an export as a float model, whose linears round their inputs where the export says so."""
    opened = exporter.open(folder)
    dtype = compute_dtype(config.dtype, opened.dtype(), choose_device(config.device))
    config = config.model_copy(update={"dtype": dtype_name(dtype)})
    with temporary_folder() as dense:
        write_folder(folder, dense, _published(opened, exporter), None, config.dtype, any_link=True)
        loaded = load_model(config.model_copy(update={"path": str(dense)}))
    places = exporter.places(published(skeleton(folder)))
    packed = {f"{name}.weight" for name in opened.packed()}
    for linear in dict.fromkeys(linear for key, place in places.items() if key in packed for linear in place.linears):
        if (grid := _rounding(opened, exporter, linear, places)) is not None:
            round_inputs(loaded.model.get_submodule(linear), grid)
    return replace(loaded, path=config.path, folder=folder)


def _published(opened: WrittenFolder, exporter: Exporter) -> dict[str, Tensor]:
    """Return the tensors of an export as a published float checkpoint holds them."""
    names = published(skeleton(opened.folder))
    places, packed = exporter.places(names), opened.packed()
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}  # the weights of linears whose rows the format holds in other tensors

    for name in opened.names():
        linear, _, leaf = name.rpartition(".")
        if linear not in packed or leaf == "bias":
            if name in places and name not in names.places:
                places[name].scatter(places[name].flat(opened.tensor(name)), weights, names.rows)
            else:
                tensors[name] = opened.tensor(name)
    for name in packed:
        key, rows = f"{name}.weight", exporter.read(opened, name)
        if (place := names.places.get(key)) is not None:
            tensors[key] = place.shaped(rows)
        elif key in places:
            places[key].scatter(rows, weights, names.rows)
        else:  # a name in memory, of an older export
            tensors[key] = rows.contiguous()
    return tensors | {
        key: place.shaped(place.gather(weights.__getitem__))
        for key, place in names.places.items()
        if place.linears.keys() <= weights.keys()
    }


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
