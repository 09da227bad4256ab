"""A report in which every field is set."""

import itertools
from typing import Any

from helpers.records import locked, per_block, per_step
from qtool.reports.bench_report import BenchReport, Variant, speed
from qtool.reports.records import (
    CalibrationText,
    Continuation,
    Exported,
    Linear,
    Metric,
    ModelTable,
    Published,
    TaskResult,
    task_result,
)
from qtool.reports.report import Report


def row(task: str, metric: str, value: float, reference: float | None = None, **fields: Any) -> TaskResult:
    other = None if reference is None else Metric(value=reference, stderr=0.05, n=10)
    return task_result(task, metric, Metric(value=value, stderr=0.04, n=10), other, **fields)


def linears(name: str = "model.layers", blocks: int = 3) -> tuple[Linear, ...]:
    widths = itertools.cycle((4, 2, None))
    return tuple(
        Linear(
            name=f"{name}.{block}.{part}",
            shape=(8, 8),
            num_bits=(bits := next(widths)),
            weight_error=None if bits is None else 0.01 * (block + 1) / bits,
        )
        for block in range(blocks)
        for part in ("attn.q_proj", "mlp.up_proj")
    )


def benched(name: str = "some/model") -> BenchReport:
    """Return what ``qtool bench`` measures: dense 100, packed 150 tokens per second."""

    def variant(kind: str, seconds: float, size: int) -> Variant:
        speeds = {measure: speed(150, [seconds] * 3, [None] * 3) for measure in ("decode, batch 1", "prefill")}
        sizes = {"file_bytes": size, "weight_bytes": size, "peak_bytes": size}
        return Variant(name=kind, title=name, linears=name, speeds=speeds, **sizes)

    return BenchReport(
        path=name,
        label="w4g64",
        dtype="bfloat16",
        device="cpu",
        threads=2,
        prompt_tokens=64,
        variants=(variant("dense", 1.5, 6_800_000), variant("fast", 1.0, 2_000_000)),
        energy=name,
        remarks=(name,),
        environment={"torch": name},
        machine={"processor": name},
        date="2025-01-01T00:00:00+00:00",
    )


def full(name: str = "some/model") -> Report:
    """Return a report in which every field is set; ``name`` stands wherever a name can."""
    return Report(
        model=name,
        quantized=f"out/{name}",
        method="gptq",
        label="w4g64",
        bits_per_weight=4.25,
        float_bytes=6_800_000,
        quantized_bytes=2_000_000,
        seconds={"load": 0.1, "quantize": 75.0, name: 3.0},
        peak_bytes={"load": 10**8, "quantize": 3 * 10**9},
        peak_gpu_bytes={"quantize": 5 * 10**9},
        calibration=CalibrationText(source=name, num_samples=4, seq_len=32),
        results=(
            row(
                "wikitext2", "perplexity", 35.1, 34.0, delta_stderr=0.03, note=name, overlap=0.5, higher_is_better=False
            ),
            row("kl", "kl", 0.0312, higher_is_better=False),
            row(name, "acc", 0.25, 0.26, num_fewshot=5, limit=20, higher_is_better=True),
            row("mmlu_part", "acc", 0.2525, 0.24, detail=True, higher_is_better=True),
            TaskResult(task="generated", metric="perplexity", value=None, note="not measured: no reason"),
        ),
        continuations=(
            Continuation(prompt=name, text=f"{name}\n  two", num_tokens=9, float_text=f"{name} one", num_same=4),
            Continuation(prompt="?", text="", num_tokens=1, float_text="", num_same=1),
        ),
        expected=(Published(task="wikitext2", metric="perplexity", value=35.0, source=name, measured=35.1),),
        linears=linears(name),
        series=(per_block(0.001, 0.002, 0.003), per_step("e2e_loss", [1 / (i + 1) for i in range(900)])),
        exports=(
            Exported(
                format="gptq", path=name, num_bytes=2_100_000, weight_difference=0, logit_difference=1e-7, notes=(name,)
            ),
        ),
        file_bits_per_weight=7.9,
        tables=(
            ModelTable(
                name=name,
                role="embedding and head (tied)",
                shape=(1000, 500),
                grid="bfloat16",
                bits_per_weight=16.0,
                num_bytes=1_000_000,
                int8_bytes=502_000,
            ),
        ),
        bench=benched(name),
        command="ptq",
        recipe=f"model:\n  path: {name!r}\n",
        machine={"processor": name, "cores": "8", "memory": "32.0 GB", "GPU": "2 x a GPU, 80.0 GB"},
        licence={"license": "other", "license_name": name},
        lock=locked(model_files={name: "abc"}, method={"e2e": {"validate_every": 0}}),
        environment={"torch": name},
        date="2025-01-01T00:00:00+00:00",
    )
