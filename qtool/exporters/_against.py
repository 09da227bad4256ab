"""``qtool verify --against``: the weights of a written folder, unpacked by other software and compared bit by bit.

Against a native checkpoint, every dequantized number must be equal, and so must every other tensor and the config.
Against a float model there is nothing to be equal to: quantized weights must resemble those of the model, which shows
exchanged rows, and weights of another model.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.checkpoints.files import SafetensorsFolder
from qtool.checkpoints.native import NativeCheckpoint
from qtool.exporters._base import Exporter
from qtool.exporters._folder import (
    WrittenFolder,
    is_known,
    packed_places,
    published_names,
    quantization_section,
    reader,
    row_parts,
    skeleton,
)
from qtool.exporters._outside import Runner, python_for, running, versions
from qtool.exporters._published import Place, Published, published
from qtool.exporters._readback import config_fault, other_float
from qtool.quant.affine import dequantize
from qtool.reports.verification import Difference, ReaderCheck
from qtool.system.errors import InputError
from qtool.system.version import __version__

OWN = "qtool"  # name of the reader that is Exporter.read
ALIKE = 0.5  # least cosine of the angle between a quantized weight and the float one; 2 bits give 0.8 and more
Weights = Iterator[tuple[str, Tensor]]  # names in the files, and float32 rows


class Reader(NamedTuple):
    """The software that unpacks the weights of a written folder, and its versions."""

    name: str
    versions: dict[str, str]
    python: Path | None
    """The Python of its environment; ``None``: it is called in this process, by ``Exporter.read``."""
    runner: Runner | None = None
    missing: str = ""
    """Why it is not the format's independent reader, and how to install that; empty if it is."""


def find_reader(exporter: Exporter, python: Path | None = None) -> Reader:
    """Return the independent reader of a format if it is installed, in the environment of ``python`` if that is given.

    Else it is qtool's own second reader, ``Exporter.read``, which shares no code with the writer.
    """
    own = Reader(OWN, {"qtool": __version__}, None)
    if exporter.reads_with:  # ``read`` calls that package
        return Reader(exporter.reads_with, {exporter.reads_with: version(exporter.reads_with)}, None)
    runner = exporter.reader
    if runner is None:
        return own._replace(missing="no other software gives the weights of this format")
    name = runner.packages[0]
    there = python_for(name, python)
    found = versions(runner, there)
    if found is None:
        return own._replace(missing=f"{name} is not installed: {runner.how_to_install}")
    return Reader(name, found, there, runner)


def against_native(folder: Path, exporter: Exporter, source: NativeCheckpoint, by: Reader, dtype: str) -> ReaderCheck:
    """Compare the written ``folder`` with the checkpoint that it was made from, weights as ``by`` unpacks them.

    ``dtype`` is the one that was asked for: weights of a format that rounds to it are compared after that.

    Raises:
        RunError: the reader failed.
    """
    opened, weight = exporter.open(folder), reader(source)
    rounded = None if dtype == "auto" or not exporter.dtype_may_round else getattr(torch, dtype)
    places = packed_places(source, exporter.places(published_names(source)))

    def linear(name: str) -> Tensor:
        found = dequantize(*weight(name)) if name in source.specs else source.tensor(f"{name}.weight").float()
        return found if rounded is None else found.to(rounded).float()

    found, numbers, own = [], 0, 0
    for name, rows, by_own in _weights(opened, exporter, places, by):
        expected = places[name].gather(linear)
        numbers += expected.numel()
        own += by_own
        if (difference := _difference(name, rows, expected)) is not None:
            found.append(difference)
    others = [] if rounded is not None else [other_float(source, opened, exporter)]
    others += [config_fault(opened, source, exporter.config_keys)]
    return ReaderCheck(
        reader=by.name,
        versions=by.versions,
        against=source.folder.absolute().name,
        kind="checkpoint",
        weights=len(places),
        numbers=numbers,
        by_qtool=0 if by.python is None else own,
        differing=tuple(sorted(found, key=lambda each: each.name)),
        other_fault=next((f"{each} differs" for each in others if each is not None), ""),
        missing=by.missing,
    )


def against_float(folder: Path, exporter: Exporter, model: Path, by: Reader) -> ReaderCheck:
    """Compare the written ``folder`` with the float ``model`` that it is said to be made from.

    Raises:
        InputError: transformers has no class for the model, or the two have different tensors.
        RunError: the reader failed.
    """
    if not is_known(folder):
        raise InputError(f"{folder}: transformers has no class for its model; give the checkpoint as --against")
    opened, names = exporter.open(folder), published(skeleton(folder))
    floats = _FloatModel(model, names)
    packed = opened.packed()
    places = {key.removesuffix(".weight"): place for key, place in exporter.places(names).items()}
    chosen = {name: place for name, place in places.items() if not packed or name in packed}
    found, numbers, own, cosines, errors = [], 0, 0, [], []
    for name, rows, by_own in _weights(opened, exporter, chosen, by):
        expected = chosen[name].gather(floats.linear)
        numbers += expected.numel()
        own += by_own
        cosine, error = _likeness(rows, expected)
        cosines.append(cosine)
        errors.append(error)
        if not cosine >= ALIKE:
            found.append(Difference(name=name, numbers=expected.numel(), largest=float((rows - expected).abs().max())))
    return ReaderCheck(
        reader=by.name,
        versions=by.versions,
        against=model.absolute().name,
        kind="float model",
        weights=len(chosen),
        numbers=numbers,
        by_qtool=0 if by.python is None else own,
        differing=tuple(found),
        least_cosine=min(cosines, default=None),
        mean_error=sum(errors) / len(errors) if errors else None,
        other_fault="",
        missing=by.missing,
    )


def _weights(
    opened: WrittenFolder, exporter: Exporter, places: dict[str, Place], by: Reader
) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the rows of each of ``places`` by name, and whether qtool itself read them: the reader gave none."""
    left = dict.fromkeys(places)
    if by.runner is not None and by.python is not None:
        names = {linear: name for name, place in places.items() for linear in place.linears if place.whole}
        with running(by.name, by.runner, opened.folder, by.python, "--weights") as (_, records):
            for record in records:
                name = record.keys["weight"]
                name = name if name in left else names.get(name, "")
                if name in left and record.array is not None:
                    del left[name]
                    yield name, torch.from_numpy(record.array).float().flatten(0, -2), False
    for name in left:
        yield name, exporter.read(opened, name), True


def _difference(name: str, rows: Tensor, expected: Tensor) -> Difference | None:
    """Return how ``rows`` differ from the ``expected`` ones; ``None`` if every number is equal."""
    if rows.shape != expected.shape:
        return Difference(name=name, numbers=expected.numel(), largest=float("inf"))
    count, largest = 0, 0.0
    for some in row_parts(rows):
        other = rows[some] != expected[some]
        count += int(other.sum())
        largest = max(largest, float((rows[some] - expected[some]).abs().nan_to_num(torch.inf).max()))
    return Difference(name=name, numbers=count, largest=largest) if count else None


def _likeness(rows: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the cosine of the angle between two weights, and the squared distance over the square of the second."""
    if rows.shape != expected.shape:
        return float("nan"), float("inf")
    dot = square = own = distance = 0.0
    for some in row_parts(rows):
        a, b = rows[some].double(), expected[some].double()
        dot, own, square = dot + float((a * b).sum()), own + float((a * a).sum()), square + float((b * b).sum())
        distance += float(((a - b) ** 2).sum())
    if not square:
        return (1.0, 0.0) if not own else (float("nan"), float("inf"))
    return dot / (own * square) ** 0.5 if own else float("nan"), distance / square


class _FloatModel:
    """The linears of a float model folder, by their names in memory."""

    def __init__(self, folder: Path, names: Published) -> None:
        self._folder, self._names = folder, names
        self._files = SafetensorsFolder(folder)
        self.linear: Callable[[str], Tensor] = lru_cache(maxsize=4)(self._linear)

    def _linear(self, name: str) -> Tensor:
        """Return the weight float32 ``[out, in]`` of a linear."""
        found: dict[str, Tensor] = {}
        for key in self._names.keys(name):
            if key not in self._files.names:
                raise InputError(f"{self._folder} has no tensor {key}; give the float model that the export is of")
            place = self._names.places[key]
            place.scatter(place.flat(self._files.tensor(key).float()), found, self._names.rows)
        return found[name]


def asymmetric_groups(folder: Path) -> int:
    """Return the number of config groups of a folder of compressed-tensors if one is asymmetric; else 0."""
    groups = list((quantization_section(folder).get("config_groups") or {}).values())
    return len(groups) if not all(group["weights"].get("symmetric", True) for group in groups) else 0
