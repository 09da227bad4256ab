"""``qtool verify --engine``: an export is loaded in the engine that it is for, and computes beside torch.

torch computes in float32 with the weights that qtool's second reader finds in the same folder. Logits must be equal up
to the engine's tolerance: engines that compute in float32 differ in the order of sums only, others round inputs or
results. Perplexities of the two follow from the same logits.
"""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.config import engines
from qtool.config.engines import Reads
from qtool.config.sections import ModelConfig
from qtool.data.readers import READERS, check_file, read_file
from qtool.data.short_text import SHORT_TEXT
from qtool.data.sources import source_texts
from qtool.data.vocabulary import check_ids
from qtool.exporters import _base
from qtool.exporters._against import asymmetric_groups, find_reader
from qtool.exporters._outside import Runner, python_for, running, variable, versions
from qtool.exporters._readback import load_exported
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.tokenizer import tokenized
from qtool.reports.verification import Available, EngineCheck
from qtool.system import progress
from qtool.system.errors import InputError, RunError, nearest
from qtool.system.scratch import temporary_folder

BUILT_IN, WIKITEXT = "built-in", "wikitext2"  # names of texts
TEXT_CHARACTERS = 2000  # characters of the text that an engine's own tokenizer reads too


class EngineRun(NamedTuple):
    """How an engine is run, and how much its results may differ."""

    file: str
    """Its program below ``exporters/_runners``."""
    packages: tuple[str, ...]
    """Its packages."""
    logits: float = 1e-4
    """Largest norm of the difference of logits, relative to the norm of torch's."""
    perplexity: float = 1e-4
    """Largest relative difference of the perplexity."""
    install: str = ""
    """Arguments of ``pip install``; empty: its packages."""

    def runner(self, reads: Reads) -> Runner:
        """Return its program, which needs the packages that reading the format takes."""
        also = [each for each in reads.packages if each not in (*self.packages, "qtool")]
        return Runner(self.file, (*self.packages, *also), " ".join([self.install, *also]) if self.install else "")


EIGHT_BITS, SIXTEEN_BITS = (0.15, 0.05), (0.05, 0.02)  # tolerances where inputs, or all results, are rounded
RUNS = {
    "transformers": EngineRun("transformers", ("transformers",)),
    "mlx": EngineRun("mlx", ("mlx-lm", "mlx"), install="mlx-lm 'mlx[cpu]'"),
    "llama.cpp": EngineRun("llama_cpp", ("llama-cpp-python",), *EIGHT_BITS),
    "gptqmodel": EngineRun("gptqmodel", ("gptqmodel",)),
    "auto-round": EngineRun("transformers", ("auto-round", "transformers")),
    "onnxruntime": EngineRun("onnxruntime", ("onnxruntime",), *EIGHT_BITS),
    "vllm": EngineRun("vllm", ("vllm",), *SIXTEEN_BITS),
    "sglang": EngineRun("sglang", ("sglang",), *SIXTEEN_BITS),
}


class Text(NamedTuple):
    """What an engine reads: the name of a text, and how much of it."""

    name: str = BUILT_IN
    """``built-in``, ``wikitext2``, or the path of a file."""
    windows: int = 4
    context: int = 512


def today() -> str:
    """Return the date, UTC."""
    return datetime.now(UTC).date().isoformat()


def software(format: str) -> tuple[Available, ...]:
    """Return the independent reader of a format and the engines that read it, each with its version if it is here."""
    exporter, found = _base.get(format), []
    if exporter.reads_with or exporter.reader is not None:
        by = find_reader(exporter)
        name = exporter.reads_with or (exporter.reader.packages[0] if exporter.reader else "")
        version = None if by.missing else by.versions.get(name)
        found.append(Available(name=name, reads="--against", version=version, install=by.missing.partition(": ")[2]))
    for name, run in RUNS.items():
        if (reads := engines.reads(name, format)) is not None:
            runner = run.runner(reads)
            there = versions(runner, python_for(name, None))
            install = f"{runner.how_to_install}, or set {variable(name)}"
            version = None if there is None else ", ".join(f"{key} {value}" for key, value in there.items())
            found.append(Available(name=name, reads=f"--engine {name}", version=version, install=install))
    return tuple(found)


def loading(engine: str, format: str, folder: Path) -> tuple[Reads, str]:
    """Return what ``engine`` reads of ``format``, and the code that loads ``folder``, with ``{folder}`` for its path.

    Raises:
        InputError: there is no such engine, or it does not read the format or this folder.
    """
    if engine not in RUNS:
        hint = nearest(engine, RUNS, "; did you mean {}?")
        raise InputError(f"--engine: {engine!r} is none of {', '.join(RUNS)}{hint}")
    found = engines.reads(engine, format)
    if found is None:
        able = [name for name in RUNS if engines.reads(name, format) is not None]
        raise InputError(f"{engine} does not read {format}; engines that do: {', '.join(able) or 'none'}")
    groups = asymmetric_groups(folder) if (engine, format) == ("transformers", "compressed-tensors") else 0
    if groups > 1:
        raise InputError(
            f"{folder} has several grids, some of them asymmetric, which transformers with compressed-tensors 0.18 to "
            "0.20 does not load; verify it with vllm"
        )
    return found, engines.DEQUANTIZED if groups else found.load


def in_engine(folder: Path, format: str, engine: str, python: Path | None, text: Text) -> EngineCheck:
    """Return the logits and the perplexity of the export in ``folder`` in an engine, beside torch's.

    Raises:
        InputError: the engine does not read the format or cannot be run here, or the text cannot be used.
        RunError: the engine failed.
    """
    reads, load = loading(engine, format, folder)
    run = RUNS[engine]
    there = python_for(engine, python)
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu")
    loaded = load_exported(config) or load_model(config, quantized=True)
    written = _text(text)
    windows = _windows(written, loaded, text)
    with temporary_folder() as scratch:
        np.save(scratch / "tokens.npy", windows.numpy())
        (scratch / "texts.json").write_text(json.dumps([written[:TEXT_CHARACTERS]]), encoding="utf-8")
        options = ("--tokens", str(scratch / "tokens.npy"), "--texts", str(scratch / "texts.json"))
        sums, tokens = _Sums(), None
        with running(engine, run.runner(reads), folder, there, *options) as (first, records):
            progress.note(f"{engine}: {', '.join(f'{k} {v}' for k, v in first.get('versions', {}).items())}, {there}")
            for record in records:
                if record.array is not None:
                    sums.add(loaded, windows[record.keys["logits"]], torch.from_numpy(record.array), engine)
                elif "text" in record.keys:
                    tokens = record.keys["tokens"]
    own = tokenized(loaded.tokenizer, written[:TEXT_CHARACTERS], text.name)["input_ids"]
    logits, perplexity = (run.logits, run.perplexity) if load == reads.load else SIXTEEN_BITS
    return EngineCheck(
        engine=engine,
        versions=first["versions"],
        python=first["python"],
        text=text.name if text.name in (BUILT_IN, WIKITEXT) else Path(text.name).name,
        windows=len(windows),
        context=windows.shape[1],
        logit_difference=sums.difference,
        logit_tolerance=logits,
        perplexity=sums.perplexity(0),
        torch_perplexity=sums.perplexity(1),
        perplexity_tolerance=perplexity,
        tokens_equal=None if tokens is None else tokens == own,
        load=load,
        language="python" if engine not in engines.ENGINES else engines.ENGINES[engine].code,
        date=today(),
    )


class _Sums:
    """Sums over positions of an engine's logits and torch's."""

    def __init__(self) -> None:
        self.squares = [0.0, 0.0]  # of the difference, and of torch's logits
        self.losses = [0.0, 0.0]  # of the engine, and of torch
        self.count = 0

    @torch.inference_mode()
    def add(self, loaded: LoadedModel, tokens: Tensor, theirs: Tensor, engine: str) -> None:
        """Add a window: ``tokens`` ``[t]``, and the engine's logits ``[t, vocabulary]``."""
        ours = loaded.model(tokens[None], use_cache=False).logits[0].float()
        if theirs.shape != ours.shape:
            raise RunError(f"{engine} gave logits of shape {list(theirs.shape)}; {list(ours.shape)} was expected")
        a, b = (each.double() - each.double().mean(1, keepdim=True) for each in (theirs, ours))
        self.squares[0] += float(((a - b) ** 2).sum())
        self.squares[1] += float((b**2).sum())
        for index, each in enumerate((theirs, ours)):
            self.losses[index] += float(F.cross_entropy(each[:-1].double(), tokens[1:], reduction="sum"))
        self.count += len(tokens) - 1

    @property
    def difference(self) -> float:
        """The norm of the difference of logits, relative to the norm of torch's."""
        return math.sqrt(self.squares[0] / self.squares[1]) if self.count else math.nan

    def perplexity(self, index: int) -> float:
        """Return the perplexity of the engine, 0, or of torch, 1."""
        return math.exp(min(self.losses[index] / self.count, 700.0)) if self.count else math.nan


def _text(text: Text) -> str:
    """Return the text.

    Raises:
        InputError: it cannot be read.
    """
    if text.name == BUILT_IN:
        return SHORT_TEXT
    if text.name == WIKITEXT:
        return "\n\n".join(source_texts(WIKITEXT, "test"))
    check_file(Path(text.name), tuple(READERS), "--text")
    return "\n\n".join(read_file(Path(text.name)))


def _windows(written: str, loaded: LoadedModel, text: Text) -> Tensor:
    """Return windows of tokens ``[n, t]`` int64, consecutive; one shorter window if the text fills none."""
    ids = torch.tensor(tokenized(loaded.tokenizer, written, text.name)["input_ids"], dtype=torch.int64)
    length = min(text.context, loaded.max_length, len(ids))
    if length < 2:
        raise InputError(f"--text: {text.name} has {len(ids)} token(s); at least two are needed")
    found = ids[: len(ids) // length * length].view(-1, length)[: text.windows]
    check_ids(found, loaded, f"the text {text.name}")
    return found
