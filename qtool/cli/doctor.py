"""``qtool doctor``: report what qtool finds on this machine, and what is wrong with it."""

import os
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.request import getproxies

from packaging.requirements import Requirement
from packaging.version import Version

from qtool.system.distribution import NAME, TESTED_TORCH, install
from qtool.system.environment import processor
from qtool.system.errors import counted
from qtool.system.units import size
from qtool.system.version import __version__

TIMED_SIZE, TIMED_GROUP = 4096, 128  # channels of the weights that kernels are timed on, and of their groups

EXTRAS = {  # extra of qtool that installs an optional package
    "gguf": "gguf",
    "lm-eval": "tasks",
    "onnx": "onnx",
    "onnxruntime": "ort",
    "onnxruntime-genai": "onnx",
    "submitit": "cluster",
}
OPTIONAL = {
    "lm-eval": "tasks such as boolq and mmlu",
    "compressed-tensors": "reads our folders without qtool",
    "gptqmodel": "outside reader of gptq and awq exports",
    "auto-round": "outside reader of auto-round and gptq exports",
    "gguf": "writes and reads gguf exports",
    "llama-cpp-python": "runs gguf exports",
    "mlx-lm": "runs mlx exports",
    "onnx": "reads onnx exports back",
    "onnxruntime-genai": "builds the graphs of onnx exports, and runs them",
    "bitsandbytes": "8-bit optimizers",
    "gemlite": "fast kernels on CUDA",
    "onnxruntime": "fast kernels on a processor",
    "submitit": "sweeps on a Slurm cluster",
    "ray": "sweeps on a Ray cluster",
    "tensorboard": "tracker: curves and recipes of runs",
    "wandb": "tracker: curves and recipes of runs",
    "mlflow": "tracker: curves and recipes of runs",
}


def doctor() -> dict[str, Any]:
    """Return versions, devices, data, hub and optional packages as plain data.

    ``problems`` says what to correct, ``notes`` what was not tested.
    """
    packages = _required()
    problems = [
        f"{name} {'is missing' if row['version'] is None else row['version'] + ' does not fit'}"
        f'{", it must be " + row["needs"] if row["needs"] else ""}: pip install "{name}{row["needs"]}"'
        for name, row in packages.items()
        if not row["ok"]
    ]
    if not packages:
        problems.append("qtool is not installed, so what it needs is not known: pip install -e FOLDER, its source tree")
    devices, fault = _devices()
    return {
        "qtool": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "devices": devices,
        "kernels": _kernels() if fault is None else [],
        "speeds": _speeds() if fault is None else [],
        "data": _data(),
        "hub": _hub(),
        "optional": {name: _version(name) for name in OPTIONAL},
        "notes": _untested(packages.get("torch", {}).get("version")),
        "problems": problems + ([fault] if fault else []),
    }


def _untested(torch: str | None) -> list[str]:
    """Return a note if the version of torch is newer than the newest that qtool was tested with."""
    if torch is None or Version(Version(torch).public) <= Version(TESTED_TORCH):
        return []
    return [f"torch {torch} is newer than {TESTED_TORCH}, the newest that qtool was tested with"]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required() -> dict[str, dict[str, Any]]:
    """Return each required package with its version, the range that qtool needs, and whether the version is in it."""
    rows: dict[str, dict[str, Any]] = {}
    try:
        lines = metadata.requires(NAME) or ()
    except metadata.PackageNotFoundError:
        return rows
    for want in map(Requirement, lines):
        if want.marker is not None and not want.marker.evaluate({"extra": ""}):
            continue
        version = _version(want.name)
        fits = version is not None and want.specifier.contains(version, prereleases=True)
        rows[want.name] = {
            "version": version,
            "needs": ",".join(sorted(map(str, want.specifier), reverse=True)),
            "ok": fits,
        }
    return rows


def _devices() -> tuple[dict[str, Any], str | None]:
    """Return CPU, memory, torch's threads and GPUs, and the error if torch cannot be imported."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "cpu": processor(),
        "cores": usable,
        "memory_bytes": _memory_bytes(),
        "torch_threads": None,
        "cuda": None,
        "gpus": [],
    }
    try:
        import torch
    except (ImportError, OSError) as error:
        return found, f"torch cannot be imported: {error}"
    found["torch_threads"] = torch.get_num_threads()
    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            name = torch.cuda.get_device_name(i)
            found["gpus"].append({"name": name, "memory_bytes": total, "free_bytes": free})
    return found, None


def _memory_bytes() -> int:
    """Return the bytes this process may use: the machine's, or its control group's lower limit; 0 if unknown."""
    total = 0
    if sys.platform != "win32":
        with suppress(OSError, ValueError):
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            total = min(total or sys.maxsize, int(Path(limit).read_text(encoding="ascii")))
    return total


def _kernels() -> list[dict[str, Any]]:
    """Return the backends of packed linears, each tried on a small weight; ``reason`` says why one is not active."""
    try:
        from qtool.quant import kernels
    except ImportError:  # a missing package is already among the problems
        return []
    return kernels.examine()


def _speeds() -> list[dict[str, Any]]:
    """Return how many times as fast as the dense product each kernel is, for one row and a weight of each width."""
    try:
        import torch

        from qtool.config.quant import BITS, QuantSpec
        from qtool.quant import kernel_timing
    except ImportError:  # a missing package is already among the problems
        return []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for num_bits in BITS:
        spec = QuantSpec(num_bits=num_bits, group_size=TIMED_GROUP)
        timing = kernel_timing.timing(spec, TIMED_SIZE, TIMED_SIZE, torch.bfloat16, device)
        order = kernel_timing.ranked(timing.seconds, timing.seconds)
        rows.append(
            {
                "num_bits": num_bits,
                "speedups": {name: timing.speedup(name) for name in [*order, kernel_timing.EXACT]},
                "fastest": order[0] if order else kernel_timing.EXACT,
            }
        )
    return rows


def _data() -> dict[str, Any]:
    """Return the folder with data sets, and the names of the sets in it."""
    try:
        from qtool.data.sources import data_dir
    except ImportError:  # a missing package is already among the problems
        return {"folder": None, "found": []}
    folder = data_dir()
    if folder is None:
        return {"folder": None, "found": []}
    found = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return {"folder": str(folder), "found": sorted(found)}


def _hub() -> dict[str, Any]:
    """Return the hub's address and cache, whether libraries are told to stay offline, and whether it answers.

    ``answers`` is ``None`` behind a proxy, which accepts every connection and so is not tried.
    """
    try:
        from huggingface_hub import constants

        from qtool.data.hub import hub_answers
    except ImportError:  # a missing package is already among the problems
        return {"address": "", "offline": True, "answers": False, "cache": ""}
    offline, proxied = bool(constants.HF_HUB_OFFLINE), "https" in getproxies()
    return {
        "address": constants.ENDPOINT,
        "offline": offline,
        "answers": None if proxied and not offline else not offline and hub_answers(),
        "cache": str(constants.HF_HUB_CACHE),
    }


def _reached(hub: dict[str, Any]) -> str:
    if hub["offline"]:
        return "offline (HF_HUB_OFFLINE)"
    answer = {True: "answers", False: "does not answer", None: "through a proxy, not tried"}[hub["answers"]]
    return f"{hub['address']} {answer}"


def _kernel_name(row: dict[str, Any]) -> str:
    """Return the library, as ``--backend`` names it, the kernel and the device."""
    own = row["name"] if row["name"].startswith(row["library"]) else f"{row['library']}: {row['name']}"
    return f"{own}, {row['device'] or 'any'}"


def _use(name: str, there: bool) -> str:
    """Return what an optional package is for, and how an extra of qtool installs it if it is not there."""
    return OPTIONAL[name] if there or name not in EXTRAS else f"{OPTIONAL[name]}: {install(EXTRAS[name])}"


def render(found: dict[str, Any]) -> str:
    """Return the findings of ``doctor`` as text."""
    devices, data, hub = found["devices"], found["data"], found["hub"]
    memory = size(devices["memory_bytes"]) if devices["memory_bytes"] else "unknown"
    count = devices["torch_threads"]
    threads = "torch cannot be imported" if count is None else counted(count, "thread")
    gpus = [f"{gpu['name']}, {size(gpu['memory_bytes'])}, {size(gpu['free_bytes'])} free" for gpu in devices["gpus"]]
    no_gpu = "none" if devices["cuda"] else "none (this torch is built without CUDA)"
    if data["folder"] is None:
        where = "no folder (set QTOOL_DATA_DIR to use one); data sets come from the hub"
    else:
        where = f"{data['folder']}: {', '.join(data['found']) or 'no data sets there'}"
    here = {name: version for name, version in found["optional"].items() if version}
    sections = {
        f"qtool {found['qtool']}, Python {found['python']}, {found['platform']}": [
            (name, row["version"] or "missing", row["needs"] + ("" if row["ok"] else "  <- see below"))
            for name, row in found["packages"].items()
        ],
        "devices": [
            ("CPU", devices["cpu"], ""),
            ("", f"{devices['cores']} cores, {threads}, {memory}", ""),
            *[(f"GPU {i}", gpu, "") for i, gpu in enumerate(gpus)],
            *([] if gpus else [("GPU", no_gpu, "")]),
        ],
        "packed kernels (qtool.use_backend, --backend NAME)": [
            (_kernel_name(row), row["serves"], row["reason"] or f"active; {row['error']}") for row in found["kernels"]
        ],
        f"one row times a weight of {TIMED_SIZE} x {TIMED_SIZE}, groups of {TIMED_GROUP}, against the faster dense "
        "product; backend fast takes the fastest": [
            (f"{row['num_bits']} bits", ", ".join(f"{name} {x:.2f} x" for name, x in row["speedups"].items()), "")
            for row in found["speeds"]
        ],
        "data": [
            ("local", where, ""),
            ("hub", f"{_reached(hub)}, cache {hub['cache']}", ""),
        ],
        "optional": [(name, here.get(name, "-"), _use(name, name in here)) for name in OPTIONAL],
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        names = max(20, *(len(name) + 2 for name, _, _ in rows), 0)
        wide = max((len(value) for _, value, note in rows if note), default=0)
        lines += [f"  {name:<{names}}{value:<{wide}}  {note}".rstrip() for name, value, note in rows]
    lines += ["notes", *[f"  {line}" for line in found["notes"]]] if found["notes"] else []
    lines += ["problems", *[f"  {line}" for line in found["problems"]]] if found["problems"] else ["all is well"]
    return "\n".join(lines)
