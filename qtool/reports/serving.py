"""Speed and memory of a quantized model beside those of the float model, as the report of a run shows them."""

from qtool.reports.bench_report import DENSE, FAST, BenchReport
from qtool.reports.document import Table
from qtool.reports.text import machine_in_words, rate
from qtool.system.units import file_size, size


def table(bench: BenchReport) -> Table:
    """Return the table with a row for each measure: the dense model, the packed one, and their ratio."""
    dense, packed = bench.variant(DENSE), bench.variant(FAST)
    rows = []
    for measure, speed in dense.speeds.items():
        before, after = speed.tokens_per_second, packed.speeds[measure].tokens_per_second
        rows.append([f"{measure}, tokens/s", rate(before), rate(after), f"{after / before:.2f} x"])
    if dense.peak_bytes and packed.peak_bytes:
        peaks = dense.peak_bytes, packed.peak_bytes
        rows.append(["peak memory", *map(size, peaks), f"{peaks[1] / peaks[0]:.2f} x"])
    held = dense.weight_bytes, packed.weight_bytes
    rows.append(["weights in memory", *map(file_size, held), f"{held[1] / held[0]:.2f} x"])
    return Table(["speed and memory", f"float ({bench.dtype})", f"quantized ({bench.label})", "ratio"], rows, "lrrr")


def notes(bench: BenchReport) -> list[str]:
    """Return how it was measured, and a line for each measure in which the quantized model is no better."""
    where = f"{bench.device}, {bench.threads} threads" if bench.device == "cpu" else bench.device
    machine = f" ({machine_in_words(bench.machine)})" if bench.machine else ""
    return [
        f"speed and memory: qtool bench, {bench.dtype} on {where}{machine}, prompt of {bench.prompt_tokens} tokens, "
        f"{bench.date}; {bench.of_repeats()}",
        *bench.no_help(),
        *bench.remarks,
    ]
