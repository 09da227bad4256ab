"""``qtool bench``: the speed, memory and energy of a checkpoint, beside those of the same weights in dense linears.

The weights of one folder are measured in several ways: ``dense`` (expanded once to the model's dtype, ordinary linears
and embeddings), ``fast`` (packed, with the kernels that ``plan.backend`` names), ``exact`` (packed, as
``from_pretrained`` gives it), and, if the head is packed, ``float head``: as ``fast``, but with an ordinary head, and
embedding if the two are tied. Every number comes from forwards of the transformers model with its KV cache: prefill is
one forward over a prompt, a decode step is one forward of one token for each sequence. Repeats of all but exact take
turns, so that a machine whose speed drifts slows them alike. The exact path is measured by itself, on as few tokens as
fill ``ENOUGH`` seconds.
"""

import inspect
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtool.checkpoints.native import NativeCheckpoint
from qtool.checkpoints.quantization_config import grids_label
from qtool.config.sections import ModelConfig
from qtool.config.sweep import BenchConfig
from qtool.models.backend import check, held_bytes, use_backend
from qtool.models.cache_argument import cache_of, with_cache
from qtool.models.expanded import expand
from qtool.models.linears import packed_weights, weight_of
from qtool.models.loaded import LoadedModel
from qtool.models.loading import choose_device, load_model
from qtool.models.quiet import without_progress_bars
from qtool.models.tables import embeddings_of, head_of, tied_to
from qtool.quant.packed_weight import PackedWeight
from qtool.reports.bench_report import (
    DENSE,
    EXACT,
    FAST,
    FLOAT_HEAD,
    PREFILL,
    BenchReport,
    Speed,
    Variant,
    decode,
    speed,
)
from qtool.system import energy, memory, peaks, progress, units
from qtool.system.environment import machine
from qtool.system.errors import InputError
from qtool.system.tensors import dtype_name

BATCHES = (1, 8)
WARM_STEPS = 2
ENOUGH = 2.0  # seconds of decoding in one repeat
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class _Subject:
    """A loaded model that holds the weights in one of the ways."""

    name: str
    title: str
    model: PreTrainedModel
    file_bytes: int
    linears: str
    weight_bytes: int
    peak_bytes: int | None

    def variant(self, speeds: dict[str, Speed]) -> Variant:
        """Return the entry of the report."""
        return Variant(
            name=self.name,
            title=self.title,
            linears=self.linears,
            file_bytes=self.file_bytes,
            weight_bytes=self.weight_bytes,
            peak_bytes=self.peak_bytes,
            speeds=speeds,
        )


@without_progress_bars()
def bench(path: str, device: str, plan: BenchConfig) -> BenchReport:
    """Measure the native checkpoint at ``path``, as much and in the precision that ``plan`` says.

    Raises:
        InputError: the folder is no native checkpoint, this machine cannot run the backend, or sequences would be
            longer than the model's context.
    """
    started = time.perf_counter()
    config = ModelConfig(path=path, dtype=plan.dtype, device=device)
    source = NativeCheckpoint(Path(path))
    check(plan.backend)
    held = _Memory(choose_device(config.device))
    with progress.stage(f"loading {config.path}"):
        loaded = load_model(config, quantized=True)
    tokens = _prompts(loaded, plan)
    clock = _Clock(loaded.device, energy.meter(_uuid(loaded.device)))
    grid, name = grids_label(source.tables.linears(source.specs)), dtype_name(loaded.dtype)
    speeds: dict[str, dict[str, Speed]] = {}

    def subject(name: str, title: str, model: PreTrainedModel, file_bytes: int, linears: str) -> _Subject:
        peak = held.peak(lambda: _next_logits(model, tokens))
        weights = _num_bytes([*model.parameters(), *model.buffers()])
        return _Subject(name, title, model, file_bytes, linears, weights + held_bytes(model), peak)

    with torch.inference_mode():
        exact = subject(EXACT, f"{grid} exact", loaded.model, source.num_bytes(), "expanded for each product")
        with progress.stage("exact"):
            speeds |= _measure([exact], tokens, plan, clock)
            logits = _next_logits(loaded.model, tokens)
        serving = use_backend(loaded.model, plan.backend)
        shapes = tuple(map(str, serving.choices))
        fast = subject(FAST, f"{grid} {plan.backend}", loaded.model, source.num_bytes(), str(serving))
        difference = (_next_logits(loaded.model, tokens) - logits).abs().max() / logits.abs().max()
        beside = []
        if _holding_head(loaded.model):
            held.begin()
            model, grown = _expanded(config, FLOAT_HEAD, _holding_head)
            serving, size = use_backend(model, plan.backend), source.num_bytes() + grown
            beside.append(subject(FLOAT_HEAD, f"{grid} {plan.backend}, float head", model, size, str(serving)))
        held.begin()
        model, _ = _expanded(config, DENSE, packed_weights)
        size = _num_bytes(model.state_dict().values())
        dense = subject(DENSE, f"dense {name}", model, size, "none: ordinary linears")
        with progress.stage("dense and fast in turns"):
            speeds |= _measure([dense, fast, *beside], tokens, plan, clock)

    return BenchReport(
        path=config.path,
        label=grids_label(source.specs, source.tables),
        dtype=name,
        device=str(loaded.device),
        threads=torch.get_num_threads(),
        prompt_tokens=plan.prompt_tokens,
        variants=tuple(each.variant(speeds[each.name]) for each in (dense, fast, *beside, exact)),
        logit_difference=difference.item(),
        shapes=shapes,
        energy=clock.meter.source,
        remarks=tuple(_remarks(loaded)),
        seconds=round(time.perf_counter() - started, 3),
        machine=machine(),
    )


def _prompts(loaded: LoadedModel, plan: BenchConfig) -> Tensor:
    """Return random tokens ``[largest batch, prompt_tokens]``, the same on every call."""
    length = plan.prompt_tokens + WARM_STEPS + plan.repeats * plan.new_tokens  # tokens of a sequence after all repeats
    if length > loaded.max_length:
        raise InputError(
            f"a prompt of {plan.prompt_tokens} tokens and {plan.repeats} x {plan.new_tokens} more do not fit the "
            f"context of {loaded.path} ({loaded.max_length}); ask for fewer"
        )
    vocabulary = loaded.num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (max(BATCHES), plan.prompt_tokens), generator=generator).to(loaded.device)


def _expanded(
    config: ModelConfig, kind: str, names: Callable[[PreTrainedModel], Iterable[str]]
) -> tuple[PreTrainedModel, int]:
    """Load the model with ordinary layers in the place of the packed ones called ``names(model)``.

    Return it, and the bytes in files that their weights would take more.
    """
    with progress.stage(f"loading the model: {kind}"):
        loaded = load_model(config, quantized=True)
        return loaded.model, expand(loaded.model, names(loaded.model), loaded.dtype)


def _holding_head(model: PreTrainedModel) -> list[str]:
    """Return the name of the packed layer that holds the weight of the head, or nothing if the head is not packed."""
    head, tied = head_of(model), tied_to(model)
    if head is None or not isinstance(head[1], PackedWeight):
        return []
    return [head[0] if tied is None else tied[1]]


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; tied tensors count once."""
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in tensors}.values())


def _remarks(loaded: LoadedModel) -> list[str]:
    """Return the notes on what no column shows."""
    remarks, head = [], head_of(loaded.model)
    ends: dict[str, list[nn.Module]] = {
        "embeddings": list(embeddings_of(loaded.model).values()),
        "head": [] if head is None else [head[1]],
    }
    floats = {
        name: [weight_of(module) for module in modules if not isinstance(module, PackedWeight)]
        for name, modules in ends.items()
    }
    if float_bytes := _num_bytes(weight for weights in floats.values() for weight in weights):
        names = " and ".join(name for name, weights in floats.items() if weights)
        stay = "stays" if names == "head" else "stay"
        remarks.append(f"{names} {stay} {dtype_name(loaded.dtype)} in every column: {units.size(float_bytes)}")
    if loaded.device.type == "cpu" and loaded.dtype == torch.bfloat16:
        able = torch.cpu.get_capabilities()
        if not (able.get("avx512_bf16") or able.get("amx_bf16")):
            remarks.append("this processor has no bfloat16 arithmetic: compare with --dtype float32 too")
    return remarks


# measuring


class _Decoder:
    """A model that has read ``prompt`` ``[batch, t]`` and continues it greedily, one token per sequence and step."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor) -> None:
        self.model = model
        self._read(prompt, None)

    def step(self) -> None:
        """Run one forward of one token for each sequence, with the KV cache of all tokens before."""
        self._read(self.token, self.cache)

    def _read(self, tokens: Tensor, cache: Any) -> None:  # Any: the cache is of a class of the model's choice
        keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        last = {"logits_to_keep": 1} if keeps else {}  # as transformers' generate does
        out = self.model(input_ids=tokens, **with_cache(self.model, cache), **last)
        self.logits, self.cache = out.logits[:, -1], cache_of(out)
        self.token = self.logits.argmax(-1, keepdim=True)


def _next_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the float32 logits ``[vocabulary]`` of one decode step after the first prompt."""
    decoder = _Decoder(model, tokens[:1, :-1])
    decoder.token = tokens[:1, -1:]
    decoder.step()
    logits: Tensor = decoder.logits[0].float()
    return logits


class _Clock:
    """Measures seconds and joules of a piece of work."""

    def __init__(self, device: torch.device, meter: energy.Meter) -> None:
        self.device, self.meter = device, meter

    def time(self, work: Callable[[], object]) -> tuple[float, float | None]:
        """Run ``work`` to its end, on the GPU too; return seconds, and joules if they can be measured."""
        _synchronize(self.device)
        before, start = self.meter.read(), time.perf_counter()
        work()
        _synchronize(self.device)
        seconds = time.perf_counter() - start
        return seconds, self.meter.joules(before, self.meter.read())


def _measure(subjects: list[_Subject], tokens: Tensor, plan: BenchConfig, clock: _Clock) -> dict[str, dict[str, Speed]]:
    """Return speeds by subject and measure; in each repeat the subjects take turns at each measure."""
    work: dict[tuple[str, str], tuple[int, Callable[[], object]]] = {}  # number of tokens, and the work
    for subject in subjects:
        for batch in BATCHES:
            decoder = _Decoder(subject.model, tokens[:batch])  # the first prefill warms up
            steps = plan.new_tokens
            for _ in range(WARM_STEPS):
                seconds, _ = clock.time(decoder.step)
                steps = max(1, min(plan.new_tokens, int(ENOUGH / seconds)))
            work[subject.name, decode(batch)] = (steps * batch, partial(_steps, decoder, steps))
        work[subject.name, PREFILL] = (plan.prompt_tokens, partial(_Decoder, subject.model, tokens[:1]))
    found: dict[tuple[str, str], list[tuple[float, float | None]]] = {key: [] for key in work}
    measures = [*map(decode, BATCHES), PREFILL]
    for _ in progress.track(range(plan.repeats), "measuring", plan.repeats):
        for measure in measures:
            for subject in subjects:
                key = (subject.name, measure)
                found[key].append(clock.time(work[key][1]))
    return {
        subject.name: {
            measure: speed(work[subject.name, measure][0], *map(list, zip(*found[subject.name, measure], strict=True)))
            for measure in measures
        }
        for subject in subjects
    }


def _steps(decoder: _Decoder, num_steps: int) -> None:
    for _ in range(num_steps):
        decoder.step()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _uuid(device: torch.device) -> str | None:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


class _Memory:
    """Measures peaks of memory above the memory that was held before a model was loaded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Take the memory that is held now as the base of the peaks that follow."""
        self.base = self._held("VmRSS")

    def peak(self, work: Callable[[], object]) -> int | None:
        """Return the largest memory held while ``work`` runs; ``None`` if the system does not reset earlier peaks."""
        if not self._reset():
            return None
        work()
        top = self._held("VmHWM")
        return None if top is None or self.base is None else top - self.base

    def _reset(self) -> bool:
        """Reset the system's record of the peak; return whether that is possible."""
        memory.return_freed()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        with suppress(OSError):
            CLEAR_REFS.write_text("5", encoding="ascii")  # Linux: the peak becomes the memory held now
            return True
        return False

    def _held(self, field: str) -> int | None:
        memory.return_freed()
        if self.device.type == "cuda":
            peak = field == "VmHWM"
            return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(self.device)
        return peaks.status_bytes(field)
