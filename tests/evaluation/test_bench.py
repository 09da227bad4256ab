"""``qtool bench``: which steps are timed, their summary, and the advice when low bits do not help."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import tiny
from rich.console import Console

from qtool.cli import main
from qtool.config.quant import QuantConfig
from qtool.config.sweep import BenchConfig
from qtool.evaluation import bench as bench_module
from qtool.models.cache_argument import cache_of
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.reports import bench_report
from qtool.reports.bench_report import DENSE, EXACT, FAST, PREFILL, BenchReport, Variant
from qtool.system import energy
from qtool.system.energy import Counter, Meter
from qtool.system.errors import InputError

MEASURES = ["decode, batch 1", "decode, batch 8", "prefill"]
SMALL = BenchConfig(prompt_tokens=8, new_tokens=4, repeats=3, dtype="float32", backend="torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint of a bfloat16 model."""
    at = tmp_path_factory.mktemp("bench")
    tiny.quantize(tiny.llama(at / "float"), at / "native", QuantConfig(num_bits=4, group_size=32))
    return at / "native"


def run(folder: Path, plan: BenchConfig = SMALL) -> BenchReport:
    return bench_module.bench(str(folder), "cpu", plan)


def watch(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str], float]) -> list[tuple[str, str, int]]:
    """Let each timed step take ``seconds(variant)``; return the list of timed work: variant, measure, steps."""
    timed: list[tuple[str, str, int]] = []

    def time(clock: Any, work: Any) -> tuple[float, float | None]:
        before = clock.meter.read()
        work()
        decoder = getattr(work, "__self__", None) or (work.args[0] if work.func is bench_module._steps else None)
        model = work.args[0] if decoder is None else decoder.model
        layers = packed_linears(model).values()
        name = DENSE if not layers else FAST if all(layer.kernel for layer in layers) else EXACT
        if decoder is not None and work != decoder.step:
            timed.append((name, bench_report.decode(decoder.token.shape[0]), work.args[1]))
        elif decoder is None:
            timed.append((name, PREFILL, 0))
        return seconds(name), clock.meter.joules(before, clock.meter.read())

    monkeypatch.setattr(bench_module._Clock, "time", time)
    monkeypatch.setattr(bench_module, "ENOUGH", 5.0)
    return timed


@pytest.fixture(scope="module")
def report(folder: Path) -> BenchReport:
    """A report of a real measurement."""
    return run(folder)


def test_the_report_has_every_number(report: BenchReport, folder: Path) -> None:
    assert [variant.name for variant in report.variants] == [DENSE, FAST, EXACT]
    assert [variant.title for variant in report.variants] == ["dense float32", "w4g32 torch", "w4g32 exact"]
    for variant in report.variants:
        assert list(variant.speeds) == MEASURES
        tokens = {name: found.num_tokens for name, found in variant.speeds.items()}
        assert tokens == {"decode, batch 1": 4, "decode, batch 8": 32, "prefill": 8}
        for found in variant.speeds.values():
            assert len(found.repeats) == 3
            assert min(found.repeats) > 0
            assert found.tokens_per_second == sorted(found.repeats)[1]
            assert found.joules_per_token is None or found.joules_per_token > 0
    assert report.variant(FAST).linears.startswith("14 linears by int4 (cpu)")
    assert report.logit_difference is not None
    assert 0 < report.logit_difference < 0.02
    assert (report.dtype, report.device, report.threads) == ("float32", "cpu", torch.get_num_threads())


def test_sizes_are_those_of_the_tensors(report: BenchReport, folder: Path) -> None:
    dense, fast, exact = report.variants
    files = {name: sum(t.nbytes for t in tiny.stored(at).values()) for name, at in (("packed", folder),)}
    floats = tiny.stored(folder.parent / "float")
    numbers = sum(t.numel() for t in floats.values())
    assert dense.file_bytes == 4 * numbers
    assert dense.weight_bytes == pytest.approx(4 * numbers, abs=200)  # the rotary frequencies are the rest
    assert fast.file_bytes == exact.file_bytes == pytest.approx(files["packed"], abs=16384)
    packed = {name: t.numel() for name, t in floats.items() if ".self_attn." in name or ".mlp." in name}
    # a kernel holds 4 bits for each weight, and 32 for each group of 32
    assert fast.weight_bytes - exact.weight_bytes == sum(packed.values()) * 5 // 8
    assert exact.weight_bytes < dense.weight_bytes


def test_the_report_survives_json(report: BenchReport) -> None:
    text = report.model_dump_json()
    assert BenchReport.model_validate_json(text) == report
    assert set(json.loads(text)) == {
        "path", "label", "dtype", "device", "threads", "prompt_tokens", "variants", "logit_difference", "shapes",
        "energy", "remarks", "seconds", "environment", "machine", "date",
    }  # fmt: skip
    assert set(json.loads(text)["variants"][0]) == {
        "name", "title", "linears", "file_bytes", "weight_bytes", "peak_bytes", "speeds",
    }  # fmt: skip
    assert set(json.loads(text)["variants"][0]["speeds"]["prefill"]) == {
        "tokens_per_second", "repeats", "num_tokens", "joules_per_token",
    }  # fmt: skip


# timed work


def test_a_step_is_one_forward_of_one_token_with_the_cache(llama: LoadedModel) -> None:
    calls: list[tuple[torch.Size, int]] = []
    prompt = tiny.probe()
    with torch.inference_mode():
        decoder = bench_module._Decoder(llama.model, prompt)
        written = [prompt, decoder.token]
        llama.model.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((kwargs["input_ids"].shape, cache_of(kwargs).get_seq_length())),
            with_kwargs=True,
        )
        for _ in range(3):
            decoder.step()
            written.append(decoder.token)
        assert calls == [((2, 1), 24), ((2, 1), 25), ((2, 1), 26)]
        llama.model._forward_pre_hooks.clear()
        whole = llama.model(torch.cat(written[:-1], 1)).logits
    assert torch.allclose(decoder.logits, whole[:, -1], atol=1e-4)
    for i, token in enumerate(written[1:]):
        assert torch.equal(token[:, 0], whole[:, 23 + i].argmax(-1))


def test_dense_and_fast_take_turns_and_exact_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = watch(monkeypatch, lambda _: 0.01)
    run(folder)
    steps = {measure: 0 if measure == PREFILL else 4 for measure in MEASURES}
    turn = [(name, measure, steps[measure]) for measure in MEASURES for name in (DENSE, FAST)]
    assert timed == [(EXACT, measure, steps[measure]) for _ in range(3) for measure in MEASURES] + 3 * turn


def test_a_backend_that_this_machine_cannot_run_is_refused_before_loading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtool.quant.ort_kernel.find_spec", lambda name: None)
    monkeypatch.setattr("qtool.evaluation.bench.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match=r'backend ort: onnxruntime and onnx not installed: pip install "qtool-llm\['):
        bench_module.bench(str(folder), "cpu", BenchConfig(backend="ort"))


def test_a_slow_path_decodes_fewer_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {DENSE: 2.0, FAST: 0.1, EXACT: 60.0}
    timed = watch(monkeypatch, times.__getitem__)
    report = run(folder)
    assert {(name, steps) for name, measure, steps in timed if measure != PREFILL} == {
        (DENSE, 2),
        (FAST, 4),
        (EXACT, 1),
    }
    speeds = {variant.name: variant.speeds["decode, batch 8"].tokens_per_second for variant in report.variants}
    assert speeds == {DENSE: 8.0, FAST: 320.0, EXACT: 8 / 60}


def test_medians() -> None:
    found = bench_report.speed(10, [2.0, 1.0, 5.0], [None, None, None])
    assert (found.tokens_per_second, found.repeats) == (5.0, (5.0, 10.0, 2.0))
    assert found.joules_per_token is None
    assert found.spread == 8 / 5
    found = bench_report.speed(10, [1.0, 2.0], [30.0, 10.0])
    assert (found.tokens_per_second, found.joules_per_token) == (7.5, 2.0)


# text of the report


def made(fast: float, dense: float, fast_peak: int | None = 1, dense_peak: int | None = 2) -> BenchReport:
    """Return a report with these speeds for each measure; packed prefill is twice as fast as dense."""

    def variant(name: str, tokens: float, peak: int | None) -> Variant:
        speeds = {measure: bench_report.speed(1, [1 / tokens], [None]) for measure in MEASURES}
        if name == FAST:
            speeds[PREFILL] = bench_report.speed(1, [1 / dense / 2], [None])
        return Variant(
            name=name, title=name, linears="none", file_bytes=10**6, weight_bytes=10**6, peak_bytes=peak, speeds=speeds
        )

    return BenchReport(
        path="x",
        label="w4g64",
        dtype="bfloat16",
        device="cpu",
        threads=2,
        prompt_tokens=8,
        variants=(variant(DENSE, dense, dense_peak), variant(FAST, fast, fast_peak), variant(EXACT, 1.0, 1)),
        energy="not measured: none here",
    )


def test_it_says_where_low_bits_do_not_help() -> None:
    columns, ratios, *_ = made(fast=3.0, dense=1.0).notes()
    assert [word in columns for word in ("dense: ", "fast: ", "exact: ")] == [True] * 3
    assert ratios.startswith("(1.50 x): one and a half times as many tokens/s as dense")
    assert made(fast=3.0, dense=1.0).no_help() == []
    assert made(fast=1.02, dense=1.0).no_help() == [
        "decode, batch 1: low bits do not help on this machine, 1.02 x dense",
        "decode, batch 8: low bits do not help on this machine, 1.02 x dense",
    ]
    larger = made(fast=3.0, dense=1.0, fast_peak=3 * 10**9, dense_peak=2 * 10**9)
    assert larger.no_help() == ["memory: low bits do not help on this machine, 3.0 GB against 2.0 GB dense"]
    assert made(fast=3.0, dense=1.0, fast_peak=None).no_help() == []


def test_it_says_so_from_measured_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch, {DENSE: 1.0, FAST: 1.25, EXACT: 1.0}.__getitem__)
    text = run(folder).markdown()
    for measure in MEASURES:
        assert f"* {measure}: low bits do not help on this machine, 0.80 x dense" in text
    watch(monkeypatch, {DENSE: 1.0, FAST: 0.25, EXACT: 1.0}.__getitem__)
    text = run(folder).markdown()
    assert "tokens/s, batch" not in text
    assert not any(f"{measure}: low bits" in text for measure in MEASURES)
    assert "| decode, batch 1, tokens/s | 4.00 | 16.0 (4.00 x) | 4.00 (1.00 x) |" in text


def test_the_table_is_the_same_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    report = made(fast=3.0, dense=1.0)
    report.render(Console(width=100))
    text = capsys.readouterr().out
    for cell in ("decode, batch 1, tokens/s", "3.00 (3.00 x)", "w4g64", "energy not measured: none here", "1 MB"):
        assert cell in text
        assert cell in report.markdown()


def test_a_system_that_cannot_reset_its_peak_has_no_peak(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_module, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    report = run(folder)
    assert {variant.peak_bytes for variant in report.variants} == {None}
    assert "| peak memory | not measured | not measured | not measured |" in report.markdown()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot reset the peak of memory")
def test_peaks_are_those_of_the_work_alone() -> None:
    """In a process of its own, because memory that earlier tests left may be freed while the work runs."""
    code = """
import torch
from qtool.evaluation import bench
held = bench._Memory(torch.device("cpu"))
size = 256 << 20
torch.ones(2 * size, dtype=torch.uint8).max()  # an earlier, higher peak
kept = torch.ones(size, dtype=torch.uint8)
print(held.peak(lambda: torch.ones(size // 2, dtype=torch.uint8).max()) / size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1.4 < float(done.stdout) < 1.7


# energy


def zone(powercap: Path, name: str, label: str, value: int, top: int = 1000) -> Path:
    at = powercap / name
    at.mkdir(parents=True)
    for file, text in (("name", label), ("energy_uj", value), ("max_energy_range_uj", top)):
        (at / file).write_text(f"{text}\n")
    return at / "energy_uj"


def test_energy_is_that_of_packages_and_memory_each_once(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 50)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 10),
        zone(tmp_path, "intel-rapl:1", "psys", 10),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 10),
    ]
    (tmp_path / "intel-rapl").mkdir()
    meter = energy.meter(powercap=tmp_path)
    assert meter.source == "RAPL package-0 + RAPL dram"
    before = meter.read()
    for file, value in ((package, 400), (memory, 75), *((other, 900) for other in others)):
        file.write_text(str(value))
    assert meter.joules(before, meter.read()) == pytest.approx(325e-6)


def test_a_counter_that_wraps_around_goes_on_counting(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 900, top=1000)
    meter = energy.meter(powercap=tmp_path)
    before = meter.read()
    file.write_text("150")
    assert meter.joules(before, meter.read()) == pytest.approx(250e-6)


def test_a_machine_without_counters_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = energy.meter(powercap=tmp_path)
    assert meter.source == f"not measured: this machine exposes no energy counter ({tmp_path} has none)"
    assert meter.joules(meter.read(), meter.read()) is None
    zone(tmp_path, "intel-rapl:0", "package-0", 900)
    read_text = Path.read_text

    def refuse(self: Path, **options: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(self, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "root only" in energy.meter(powercap=tmp_path).source


def test_a_gpu_that_computes_must_have_its_counter_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 900)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = energy.meter("123", tmp_path)
    assert (meter.counters, meter.source) == (
        (),
        "not measured: pip install nvidia-ml-py to read the GPU's energy counter",
    )
    nvml: Any = ModuleType("pynvml")
    nvml.NVMLError = RuntimeError
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = {"GPU-123": "gpu"}.__getitem__
    nvml.nvmlDeviceGetTotalEnergyConsumption = {"gpu": 2000}.__getitem__  # millijoules
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = energy.meter("123", tmp_path)
    assert meter.source == "RAPL package-0 + NVML GPU"
    before = meter.read()
    nvml.nvmlDeviceGetTotalEnergyConsumption = {"gpu": 5000}.__getitem__
    assert meter.joules(before, meter.read()) == pytest.approx(3.0)


def test_joules_reach_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    meter = Meter((Counter("a counter", lambda: 8 * next(ticks), 1.0),), "a counter")
    monkeypatch.setattr(energy, "meter", lambda _: meter)
    watch(monkeypatch, lambda _: 0.01)
    report = run(folder)
    joules = {name: found.joules_per_token for name, found in report.variant(FAST).speeds.items()}
    assert joules == {"decode, batch 1": 2.0, "decode, batch 8": 0.25, "prefill": 1.0}
    assert "| decode, batch 1, J/token | 2 | 2 | 2 |" in report.markdown()
    assert "energy" not in " ".join(report.notes())


# the command


def test_what_cannot_be_measured_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="is a float model; a qtool checkpoint is needed"):
        run(folder.parent / "float")
    with pytest.raises(InputError, match=r"256 tokens and 5 x 32 more do not fit the context of .* \(128\); ask for"):
        run(folder, BenchConfig())
    assert main.main(["bench", str(folder / "nothing")]) == 2
    assert "is not a folder; give one that qtool ptq wrote" in capsys.readouterr().err
    assert main.main(["bench", str(folder), "--repeats", "0"]) == 2
    assert main.main(["bench", str(folder), "--dtype", "int8"]) == 2
    assert "  dtype: should be 'auto', 'float32'" in capsys.readouterr().err


def test_the_command_prints_one_object_or_a_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def bench(*args: Any) -> BenchReport:
        asked.append(args)
        return made(3.0, 1.0)

    monkeypatch.setattr("qtool.evaluation.bench.bench", bench)
    options = ["--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "2", "--device", "cpu"]
    assert main.main(["bench", str(folder), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["exports"]) == (None, [])
    assert found["report"]["variants"][1]["speeds"]["decode, batch 1"]["tokens_per_second"] == 3.0
    assert main.main(["bench", str(folder), "--dtype", "float32"]) == 0
    assert "| decode, batch 1, tokens/s | 1.00 | 3.00 (3.00 x) | 1.00 (1.00 x) |" in capsys.readouterr().out
    path = str(folder)
    assert asked == [
        (path, "cpu", BenchConfig(prompt_tokens=16, new_tokens=4, repeats=2)),
        (path, "auto", BenchConfig(dtype="float32")),
    ]
